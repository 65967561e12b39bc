from django.db import models


class Invoice(models.Model):
    company = models.CharField(max_length=50)
    number = models.IntegerField()
    sent_times = models.IntegerField(default=0)
    sent_from = models.FloatField(null=True)
    sent_until = models.FloatField(null=True)
    epoch = models.BigIntegerField(null=True)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["company", "number"], name="number")]
