"""The paper's systems other than the detector, small: attention of other models, conditioned and trained."""

from .bert import Bert
from .listops import ListOps
from .vit import ViT

SYSTEMS = {'listops': ListOps, 'vit': ViT, 'bert': Bert}
