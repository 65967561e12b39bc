from celery import Celery

from celery_affinity import Affinity, AffinityQueue, affinity_task

app = Celery("shop", broker="redis://localhost:6379/0", backend="redis://localhost:6379/1")
affinity = Affinity(app, queues=[AffinityQueue("invoices")])


@affinity_task(name="shop.send_invoice", queue="invoices", tag_from="company")
def send_invoice(company, number):
    return f"{company} {number} sent"
