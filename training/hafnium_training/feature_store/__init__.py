"""Feast, driven by the contract: nobody writes feature definitions, and training and serving read the same ones.

`write_repo` makes the repo folder, `join` the training table, `materialise` the online store, `fresh_copy` another store.
"""

from hafnium_training.feature_store.join import JoinReport, join
from hafnium_training.feature_store.materialise import MaterialiseReport, ViewMaterialised, materialise
from hafnium_training.feature_store.repository import FeatureRepo, apply, fresh_copy, open_repo, write_repo

__all__ = [
    "FeatureRepo", "JoinReport", "MaterialiseReport", "ViewMaterialised", "apply", "fresh_copy", "join", "materialise",
    "open_repo", "write_repo",
]
