"""Having the unpruned model answer prompts (self-generated responses)."""

from actors.generation.engines import ENGINES, generate_locally
from actors.generation.generate import generate_responses

__all__ = ["ENGINES", "generate_locally", "generate_responses"]
