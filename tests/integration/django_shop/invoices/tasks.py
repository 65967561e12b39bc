import time

from django.db.models import F

from celery_affinity import affinity_task, current
from invoices.models import Invoice


@affinity_task(queue="invoices", tag_from="company")
def send_invoice(company, invoice_id):
    started = time.monotonic()
    ...  # render and send it: no other invoice of this company is being sent meanwhile
    Invoice.objects.filter(pk=invoice_id).update(
        sent_times=F("sent_times") + 1,
        sent_from=started,
        sent_until=time.monotonic(),
        epoch=current().epoch,
    )
