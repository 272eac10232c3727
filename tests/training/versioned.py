"""Conditional changes of small files, until `draft_model.storage` has them; not atomic."""

from contextlib import contextmanager
from hashlib import sha256

from draft_model import storage


def read_versioned(uri):
    data = storage.read_file(uri)
    return None if data is None else (data, sha256(data).hexdigest())


def replace(uri, data, version):
    found = read_versioned(uri)
    if found is None or found[1] != version:
        return False
    storage.write_bytes(uri, data)
    return True


def delete(uri, version=None):
    from draft_model.storage import growing

    found = read_versioned(uri)
    if found is None or version not in (None, found[1]):
        return False
    parent, _, name = uri.rpartition("/")
    growing.remove(parent, [name])
    return True


@contextmanager
def patience(seconds):
    yield


for function in (patience, read_versioned, replace, delete):
    if not hasattr(storage, function.__name__):
        setattr(storage, function.__name__, function)
