import pytest
from invoices import books, enter

from celery_affinity import MissingTagError, current
from celery_affinity.testing import lease


def test_the_function_itself():
    with lease("acme", queue="invoices", epoch=7):
        assert current().epoch == 7
        assert enter("acme", 1) == "acme 1"


def test_a_task_that_runs_where_it_is_sent(affinity_eager):
    assert enter.delay("acme", 1).get() == "acme 1"
    with pytest.raises(MissingTagError):
        enter.delay(None, 1)


def test_a_worker_keeps_the_order_of_each_company(affinity_worker, affinity_history):
    for number in range(10):
        for company in ("acme", "globex", "initech"):
            enter.delay(company, number)
    affinity_worker.wait_until_idle()

    affinity_history.assert_lawful()
    assert books["acme"] == books["globex"] == books["initech"] == list(range(10))
    assert affinity_worker.affinity.stats("invoices").settled == 30


def test_results_are_there(affinity_worker):
    assert enter.delay("acme", 1).get(timeout=10) == "acme 1"
