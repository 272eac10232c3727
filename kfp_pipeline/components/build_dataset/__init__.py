from .component import build_dataset as build_dataset
