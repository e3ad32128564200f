from .engines import ENGINES, generate_locally
from .transformers import generate_responses

__all__ = ["ENGINES", "generate_locally", "generate_responses"]
