import time

from celery import Celery

from celery_affinity import Affinity, AffinityQueue, affinity_task, current

app = Celery("invoices", broker="redis://localhost:6379/0", backend="redis://localhost:6379/1")
affinity = Affinity(app, queues=[AffinityQueue("invoices", max_batch_size=3)])

books: dict[str, list[int]] = {}


@affinity_task(queue="invoices", tag_from="company")
def enter(company: str, number: int) -> str:
    """Needs no lock for the company's book: no other task of the company runs."""
    book = list(books.get(company, []))
    time.sleep(0.01)
    books[company] = [*book, number]
    return f"{current().tag} {number}"
