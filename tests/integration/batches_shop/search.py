from celery import Celery

from celery_affinity import Affinity, AffinityQueue, affinity_task

app = Celery("search", broker="redis://localhost:6379/0", backend="redis://localhost:6379/1")
affinity = Affinity(app, queues=[AffinityQueue("documents", max_batch_size=100)])


@affinity_task(name="search.index", queue="documents", tag_from="tenant", batch=True, max_retries=5)
def index(requests):
    """Index documents of one tenant, as they are sent: one bulk request for all that wait."""
    tenant = requests[0].kwargs["tenant"]
    answers = bulk(tenant, [request.kwargs["text"] for request in requests])
    return [outcome(request, answer) for request, answer in zip(requests, answers, strict=True)]


def outcome(request, answer):
    """A value is the task's result; an exception fails it; `retry` tries it again."""
    if answer == "busy":
        return request.retry(countdown=0.1 * 2**request.retries)
    if answer == "refused":
        return ValueError(f"not a document: {request.kwargs['text']!r}")
    return answer


def bulk(tenant, texts):
    """Stands for a search engine, which is busy at first, and takes no empty text."""
    answers = []
    for text in texts:
        if text == "later" and "later" not in seen:
            answers.append("busy")
        else:
            answers.append(f"{tenant}/{len(text)}" if text else "refused")
        seen.add(text)
    return answers


seen = set()
