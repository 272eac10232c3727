from .component import clean_up as clean_up
