"""A module that is also the function of its own name.

Every verb lives in the file of its name, so `edgewright.run` is at once the module `edgewright/run.py` and the function
that users call, and Python puts the module there as soon as anybody imports it. Instead of making one hide the other
depending on the order of imports, the module forwards calls. One line at the end of a verb's file makes it so:

    sys.modules[__name__].__class__ = VerbModule
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import inspect
    from collections.abc import Callable


class VerbModule(types.ModuleType):
    """Calling the module `edgewright.run` calls `edgewright.run.run`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._verb(*args, **kwargs)

    @property
    def _verb(self) -> Callable[..., Any]:
        function: Callable[..., Any] = self.__dict__[self.__name__.rpartition(".")[2]]
        return function

    @property
    def __signature__(self) -> inspect.Signature:
        """What `help` and editors show."""
        import inspect

        return inspect.signature(self._verb)
