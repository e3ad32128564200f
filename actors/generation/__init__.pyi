from .engines import ENGINES, generate_locally
from .generate import generate_responses

__all__ = ["ENGINES", "generate_locally", "generate_responses"]
