"""Write docstrings for mkdocstrings, which knows no ``Example:`` and no roles of Sphinx; mkdocs.yml names this file."""

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Rename the section of examples, and show what a role names as code."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change the docstring of one object."""
        if obj.docstring is not None:
            text = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
            obj.docstring.value = re.sub(r":(?:attr|class|func|meth|mod):`", "`", text)
