from .component import preflight as preflight
