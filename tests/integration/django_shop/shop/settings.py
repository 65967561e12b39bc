from pathlib import Path

BASE_DIR = Path(__file__).resolve().parent.parent
SECRET_KEY = "only for this example"
ALLOWED_HOSTS = ["*"]
INSTALLED_APPS = ["invoices"]
ROOT_URLCONF = "shop.urls"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": BASE_DIR / "db.sqlite3",
        "OPTIONS": {"timeout": 20},
    }
}

CELERY_BROKER_URL = "redis://localhost:6379/0"
CELERY_TASK_IGNORE_RESULT = True
CELERY_AFFINITY_QUEUES = {"invoices": {"max_batch_size": 5}}
CELERY_AFFINITY_HEARTBEAT_TIMEOUT = 12
