"""Docstrings' cross-references, such as :class:`~torch.optim.Adam`, as plain code for the web."""

import re
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":\w+:`~?(?P<path>[^`]+)`")


class Roles(Extension):
    """Turns ``:role:`~a.b.C``` into ```C```, and without the tilde into ```a.b.C```."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(_as_code, obj.docstring.value)


def _as_code(role: re.Match[str]) -> str:
    path = role["path"]
    return f"`{path.rsplit('.', 1)[-1] if '~' in role[0] else path}`"
