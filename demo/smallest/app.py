"""The smallest app: the invoices of a company go out one at a time, in order, from one process."""

import os
import sys

from celery import Celery

from celery_affinity import Affinity, AffinityQueue, affinity_task

app = Celery("app", broker="redis://localhost:6379/0", backend="redis://localhost:6379/1")
affinity = Affinity(app, queues=[AffinityQueue("invoices", max_batch_size=10)])


@affinity_task(bind=True, queue="invoices", tag_from="company")
def send_invoice(self, company, number):
    here = self.affinity
    print(f"{company} {number}: pid {os.getpid()}, lease {here.epoch}, place {here.place}")
    return f"{company}-{number}"


if __name__ == "__main__":
    companies = sys.argv[1:] or ["acme", "globex", "initech"]
    sent = [send_invoice.delay(company, number) for number in range(1, 31) for company in companies]
    print(", ".join(result.get(timeout=30) for result in sent))
