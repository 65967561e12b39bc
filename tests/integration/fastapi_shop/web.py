from fastapi import FastAPI, HTTPException
from pydantic import BaseModel
from shop import affinity, app, send_invoice

from celery_affinity import TagError

web = FastAPI()


class Invoice(BaseModel):
    company: str
    number: int


@web.post("/invoices", status_code=202)
def create_invoice(invoice: Invoice):  # `def`: publishing blocks, FastAPI gives it a thread
    try:
        sent = send_invoice.delay(invoice.company, invoice.number)
    except TagError as error:  # such as an empty company
        raise HTTPException(422, str(error)) from None
    return {"task": sent.id}


@web.get("/tasks/{task_id}")
def task_state(task_id: str):
    return {"state": app.AsyncResult(task_id).state}


@web.get("/companies")
def companies():
    return {tag.tag: tag.waiting for tag in affinity.tags("invoices")}
