import pytest
from invoices import app, books


@pytest.fixture(scope="session")
def affinity_app(affinity_broker):
    app.conf.update(broker_url=affinity_broker, result_backend=affinity_broker)
    return app


@pytest.fixture(autouse=True)
def no_books():
    books.clear()
