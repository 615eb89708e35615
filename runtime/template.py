"""The checkpoint's own chat template: messages -> the text that the model reads, as transformers renders it.

    ChatTemplate(Path("build/demo/cpu")).render([{"role": "user", "content": "hello"}])

A template comes with the checkpoint and is not trusted: jinja2 runs it in its sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from export.config import read_json
from export.errors import UserError

FILE, CONFIG = "chat_template.jinja", "tokenizer_config.json"
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
Message = Mapping[str, Any]  # "role" and "content", and what else a template reads


class ChatTemplate:
    """The template of an engine directory. Raises UserError: there is none, or it is not one."""

    def __init__(self, directory: Path) -> None:
        config = read_json(directory / CONFIG) if (directory / CONFIG).is_file() else {}
        self.path, source = _find(directory, config)
        # What else a template may name: the special tokens, each as text or as an object that holds its text.
        found = {name: config.get(name) for name in SPECIAL}
        self.special = {name: v["content"] if isinstance(v, dict) else v for name, v in found.items() if v}
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            self.variables = jinja2.meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{self.path}: line {error.lineno}: {error}; get it again from the checkpoint") from None

    @property
    def knows_thinking(self) -> bool:
        """Whether thinking can be switched on and off."""
        return "enable_thinking" in self.variables

    def render(self, messages: Sequence[Message], **variables: Any) -> str:
        """The conversation, up to where the model's answer begins. Raises UserError with the template's own message."""
        given = {"tools": None, "documents": None, "add_generation_prompt": True, **self.special, **variables}
        try:
            return self._template.render(messages=list(messages), **given)
        except Exception as error:  # a template is a program: it may fail as one
            raise UserError(f"{self.path}: {error}") from None


def _find(directory: Path, config: Mapping[str, Any]) -> tuple[Path, str]:
    """The file that the template stands in, and the template."""
    path = directory / FILE
    if path.is_file():
        try:
            return path, path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text ({error.reason}); get it again from the checkpoint") from None
    source = config.get("chat_template")
    if isinstance(source, list):  # several by name, an older form
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    if not isinstance(source, str):
        raise UserError(
            f"{directory}: no chat template, neither {FILE} nor one in {CONFIG}: this checkpoint was not made to chat; "
            "use runtime.decode"
        )
    return directory / CONFIG, source


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks what a model is trained on; for rendering it means nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class _Namespace(jinja2.utils.Namespace):
    """jinja2's, without names that begin with an underscore: those would reach into Python."""

    def __init__(*args: Any, **values: Any) -> None:
        self, *rest = args  # so that `namespace(self=…)` is a value too
        for name in dict(*rest, **values):
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, *rest, **values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.sandbox.SecurityError(f"a template may not name {name!r} in a namespace")


class _Dict:
    """`dict` as templates may call it, without the class behind it."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """jinja2's own would escape for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _now(format: str) -> str:
    return datetime.now().strftime(format)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """What transformers gives its templates."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment
