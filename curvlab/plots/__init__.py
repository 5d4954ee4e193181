"""Figures from flat records, sized for the width of a page: one module per kind of figure, and one style.

The functions are listed in ``__init__.pyi``. One is imported when it is used, because matplotlib takes half a second.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
