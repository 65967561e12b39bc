from django.test import TestCase
from shop import celery_app

from invoices.models import Invoice


class InvoiceTest(TestCase):
    def setUp(self):
        celery_app.conf.task_always_eager = True  # no worker and no Redis

    def test_an_invoice_is_sent_once_its_transaction_commits(self):
        with self.captureOnCommitCallbacks(execute=True) as callbacks:
            self.client.post("/invoices/", {"company": "acme", "number": 1})
        assert len(callbacks) == 1
        assert Invoice.objects.get().sent_times == 1
