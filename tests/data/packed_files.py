"""What tests ask of a packed data set."""

import hashlib

from hpc_absa.data.packed import header
from hpc_absa.errors import HpcAbsaError


def check_content(dataset):
    """Compare the whole data set with its digest; HpcAbsaError if they differ."""
    digest = hashlib.sha256()
    for split in (dataset.train, dataset.test):
        digest.update(split.images.data)
        digest.update(split.labels.data)
    digest.update(header(dataset.train, dataset.test, dataset.classes, dataset.mean, dataset.std))
    if digest.hexdigest() != dataset.digest:
        raise HpcAbsaError(f"{dataset.path}: content and digest differ")
