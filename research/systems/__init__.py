"""Small relatives of the paper's other systems: other models with attention, conditioned and trained."""

from .bert import Bert
from .listops import ListOps
from .vit import ViT

SYSTEMS = {'listops': ListOps, 'vit': ViT, 'bert': Bert}
