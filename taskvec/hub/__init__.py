"""Models and task vectors on the Hugging Face Hub: references, downloads, and reading of remote files by ranges.

huggingface_hub, the Hub's own client, is imported when a reference is not a local path.
"""

from .models import open_checkpoint as open_checkpoint
from .models import open_model as open_model
