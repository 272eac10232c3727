from .component import import_model as import_model
