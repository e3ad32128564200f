"""Teaching: the unpruned model runs once over the data of recoveries, and what they learn from is stored."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
