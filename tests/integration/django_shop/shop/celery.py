import os

from celery import Celery

from celery_affinity import Affinity

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "shop.settings")

app = Celery("shop")
affinity = Affinity(app)  # reads no setting before one is needed
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
