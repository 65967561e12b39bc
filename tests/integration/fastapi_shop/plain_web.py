from celery import Celery
from fastapi import FastAPI

app = Celery("producer", broker="redis://localhost:6379/0", backend="redis://localhost:6379/1")
web = FastAPI()


@web.post("/invoices/{company}/{number}", status_code=202)
def create_invoice(company: str, number: int):
    sent = app.send_task(
        "shop.send_invoice",
        (company, number),
        queue="invoices",
        headers={"identify_tag": company},
    )
    return {"task": sent.id}
