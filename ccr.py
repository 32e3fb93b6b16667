#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""ccr: Claude Code with any model, through one local proxy in one file.

Claude Code (or any Anthropic or OpenAI client) speaks to http://127.0.0.1:3456; ccr picks a model by the kind of
task, translates the request to the provider's API and the reply back, token by token. Between the two ends
everything speaks one language: Anthropic Messages, as plain dicts and stream events.

    request   bytes -> parse_request -> route -> transformers -> render_request -> provider
    reply     bytes -> decode_sse -> parse_stream -> transformers -> render_stream -> client

The rooms of this file, bottom-up; each uses only those above it (`grep '^# ===' ccr.py`):

    1. Errors         one exception for whatever goes wrong in a turn
    2. Config         config.json -> Config, all faults at once
    3. Events         BlockWriter, fold and unfold: every reply is a stream of events
    4. SSE            bytes <-> frames, and the short cut for plain deltas
    5. Formats        Anthropic, OpenAI, Responses, Gemini: parse and render
    6. Transformers   the quirks of providers and models
    7. Router         which model answers, and why; tokens without a tokenizer
    8. State          the folder on disk: config, logs, what outlives a turn
    9. Upstream       pooled connections to providers
    10. Exchange      one turn from end to end: `answer` is the function to read first
    11. Server        the HTTP server in front, its gate and its endpoints
    12. Process       lock, PID file, signals, start and stop
    13. Commands      the command line
    14. Page          the web page, one string
    15. main

It needs Python 3.9 or newer and nothing else.
"""
import sys

if __name__ == "__main__" and not sys.flags.isolated and not getattr(sys.flags, "safe_path", False):
    sys.path.pop(0)    # a stray json.py beside this file must not be imported in place of the real one

import collections
import errno
import functools
import itertools
import json
import os
import re
import select
import socket
import threading
import time
from typing import NamedTuple

VERSION = "1.0.0"
PROGRAM = os.path.abspath((lambda: None).__code__.co_filename)    # this file, also when a compiled copy of it runs


class Pattern:
    """A regular expression that is compiled when it is first used: compiling all of them costs a command 30 ms."""

    def __init__(self, pattern, flags=0):
        self.pattern, self.flags = pattern, flags

    def __getattr__(self, name):
        compiled = re.compile(self.pattern, self.flags)
        for each in ("match", "fullmatch", "search", "sub", "split", "findall", "finditer"):
            setattr(self, each, getattr(compiled, each))
        return getattr(compiled, name)


# === 1. Errors =====================================================================

ERROR_TYPES = {    # HTTP status -> Anthropic error type; the client decides by status, SDKs by type
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "request_too_large",
    422: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


class ApiError(Exception):
    """Whatever goes wrong in a turn: made where a failure enters, rendered where it leaves.

    status: the HTTP status for the client; message: what, where, and what would be right; type: Anthropic's error type;
    retry_after: seconds as text, passed on; details: extra members of the error object; is_network: no answer came at all;
    is_final: a whole chain of targets failed for good, the client need not try again.
    """

    def __init__(self, status, message, type=None, retry_after=None, details=None, is_network=False):
        super().__init__(message)
        self.status, self.message, self.retry_after, self.details = status, message, retry_after, details
        self.type = type or ERROR_TYPES.get(status) or ("invalid_request_error" if 400 <= status < 500 else "api_error")
        self.is_network, self.is_final = is_network, False


class ConfigError(Exception):
    """All faults of a configuration at once, one line each, each beginning with the path of the key."""

    def __init__(self, problems):
        super().__init__("\n".join(problems))
        self.problems = list(problems)


def error_body(error: ApiError) -> dict:
    """The error in Anthropic's shape: {"type": "error", "error": {"type": ..., "message": ...}}."""
    body = {"type": error.type, "message": error.message}
    if error.details:
        body["details"] = error.details
    return {"type": "error", "error": body}


# === 2. Config ======================================================================

ROUTES = ("default", "background", "think", "longContext", "webSearch", "image", "opus", "sonnet", "haiku", "fable")
TIERS = ROUTES[6:]                      # the client's model families
FALLBACK_RULES = ROUTES + ("explicit", "subagent", "custom")
LOG_LEVELS = ("fatal", "error", "warn", "info", "debug", "trace")
SEARCH_ENGINES = {"ollama": (), "searxng": ("url",), "brave": ("api_key",), "tavily": ("api_key",)}     # and the keys each needs
DEFAULT_THRESHOLD = 60000

FORMAT_WORDS = {                        # what a config calls a wire format, or a transformer (any case) -> its name in FORMATS
    "openai": "openai", "anthropic": "anthropic", "gemini": "gemini", "responses": "responses", "openai-responses": "responses",
    "vertex-gemini": "vertex-gemini", "vertex-claude": "vertex-claude",
}

FORMAT_BY_URL = (                       # the first that fits the URL; else it speaks OpenAI chat completions
    (r"/responses/?$", "responses"),
    (r"/(chat/completions|openai|openapi)(/|$)", "openai"),
    (r"aiplatform\.googleapis\.com.*/anthropic", "vertex-claude"),
    (r"aiplatform\.googleapis\.com", "vertex-gemini"),
    (r"//generativelanguage\.googleapis\.com|/v1beta(/models)?/?$", "gemini"),
    (r"//api\.anthropic\.com|/anthropic(/|$)|/v1/messages/?$", "anthropic"),
)


class Model(NamedTuple):
    """A model as its provider lists it; None is not told."""
    name: str
    context: int = None
    max_tokens: int = None
    vision: bool = None


class Provider(NamedTuple):
    """One entry of Providers. use: None is nothing said (the defaults apply), () is `"use": []`, else ((name, options), ...)."""
    name: str
    url: str
    keys: tuple = ()
    models: tuple = ()
    format: str = "openai"
    use: tuple = None
    model_use: dict = {}
    context: int = None
    max_concurrent: int = None
    max_concurrent_models: int = None
    headers: dict = {}
    raw: dict = {}

    def model(self, name: str) -> Model:
        """The listed model of this name, in any case, else a bare Model."""
        return named(self.models, name) or Model(name)


DEMO = Provider("demo", "", models=(Model("demo"),), format="demo")


class Config(NamedTuple):
    """A configuration without faults. Routes are tuples of "provider,model" in the config's own spelling of both."""
    providers: tuple = (DEMO,)
    router: dict = {}
    fallback: dict = {}
    apikey: str = None
    host: str = "127.0.0.1"
    port: int = 3456
    timeout_s: float = 600.0
    log: bool = True
    log_level: str = "info"
    proxy_url: str = None
    non_interactive: bool = False
    claude_path: str = None
    custom_router_path: str = None
    rewrite_system_prompt: str = None
    force_image_agent: bool = False
    transformers: tuple = ()
    status_line: dict = {}
    web_search: dict = None
    prices: dict = {}
    watch: bool = True
    warnings: tuple = ()
    secrets: tuple = ()
    raw: dict = {}
    is_demo: bool = False

    def provider(self, name: str):
        """The provider of this name, exactly or else in any case; None."""
        return named(self.providers, name)

    def target(self, text: str):
        """(Provider, model) of "provider,model" in any case, a listed model in its own spelling; None without such a provider."""
        name, _, model = (part.strip() for part in text.partition(","))
        provider = self.provider(name) if model else None
        return (provider, provider.model(model).name) if provider else None

    def owner(self, model: str):
        """(Provider, model) of the first provider that lists this bare name, exactly or else in any case; None."""
        return next(((provider, listed.name) for fold in (str, str.lower) for provider in self.providers
                     for listed in provider.models if fold(listed.name) == fold(model)), None)


def named(things, name: str):
    """The first of these things with this name, else the first whose name differs only in case, else None."""
    return next((thing for fold in (str, str.lower) for thing in things if fold(thing.name) == fold(name)), None)


def target_name(target) -> str:
    """(Provider, model) as a config writes it."""
    return "%s,%s" % (target[0].name, target[1])


def parse_config(raw, env: dict, known_transformers=None) -> Config:
    """The Config of a parsed config.json; ConfigError with all of its faults. known_transformers: names, None: not checked."""
    notes = Notes(env)
    top = Section(raw, "", notes)
    entries = top.sections("Providers" if top.raw.get("Providers") or "providers" not in top.raw else "providers")
    providers = tuple(filter(None, [parse_provider(entry, known_transformers) for entry in entries]))
    names = [str(entry.raw.get("name", "")).strip() for entry in entries]
    for i, name in enumerate(names):
        if name and name in names[:i]:
            entries[i].fault("name", "another provider is already called %s" % shown(name))
    config = Config(providers if entries else (DEMO,), raw=top.raw, is_demo=not entries)
    router, apikey, timeout_ms = top.section("Router"), top.secret("APIKEY"), top.number("API_TIMEOUT_MS", 1, 2 ** 31 - 1)
    service_port = Section({**env}, "environment", notes).number("SERVICE_PORT", 0, 65535)    # it wins
    found = {field: read(top, key, *more) for field, key, read, *more in PLAIN_KEYS}
    found.update(
        port=found["port"] if service_port is None else service_port,
        router=with_default(parse_router(router, config, names), router, config), fallback=parse_fallback(top, config, names),
        apikey=apikey, host=parse_host(top, apikey), timeout_s=timeout_ms and timeout_ms / 1000, proxy_url=parse_proxy(top),
        transformers=parse_own_transformers(top), status_line=parse_status_line(top), web_search=parse_web_search(top),
        prices=parse_prices(top, config))
    top.check_spelling()
    notes.raise_faults()
    config = config._replace(**{field: value for field, value in found.items() if value is not None})
    return config._replace(warnings=tuple(notes.warnings), secrets=tuple(sorted(notes.secrets)))


def parse_override(raw, config: Config, env: dict) -> dict:
    """The Router of a project's or session's own config file, to be laid over config.router; ConfigError with all faults."""
    notes = Notes(env)
    router = parse_router(Section(raw, "", notes).section("Router"), config, ())
    notes.raise_faults()
    return router


# --- what the keys mean

URL = Pattern(r"https?://(\[[0-9a-f:.]+\]|[^\s/?#@:\[\]]+)(:[0-9]{1,5})?([/?#]\S*)?", re.I)


def parse_provider(entry, known_transformers):
    """The Provider of one entry, or None after a fault in its name or URL."""
    name, url = entry.text("name", True), entry.url("api_base_url", True)
    if name and "," in name:
        entry.fault("name", "must not hold a comma: routes are written \"provider,model\"")
    models = tuple(filter(None, [parse_model(entry, i, item) for i, item in enumerate(entry.items("models", "strings"))]))
    use, model_use = parse_transformer(entry, models, known_transformers)
    word = entry.choice("format", tuple(FORMAT_WORDS))
    word = word or next((used.lower() for used, _ in use or () if used.lower() in FORMAT_WORDS), None)
    by_url = next((found for pattern, found in FORMAT_BY_URL if re.search(pattern, (url or "").partition("?")[0])), "openai")
    keys = entry.keys("api_key")
    if any(used.lower() == "anthropic" and options.get("UseBearer") for used, options in use or ()):
        keys = tuple(key if key.startswith("Bearer ") else "Bearer " + key for key in keys)
    provider = Provider(
        name, url, keys, models, FORMAT_WORDS.get(word, by_url), use, model_use,
        *map(entry.number, ("context", "max_concurrent", "max_concurrent_models")), parse_headers(entry), entry.raw)
    entry.check_spelling()
    return provider if name and url else None


def parse_model(entry, i, item):
    """The Model of "name" or {"name", "context", "max_tokens", "vision"}; None after a fault in its name."""
    if not isinstance(item, dict):
        name = item.strip() if isinstance(item, str) else ""
        return Model(name) if name else entry.fault("models[%d]" % i, "expected a name, got %s" % shown(item))
    model = entry.section("models[%d]" % i, item)
    name = model.text("name", True)
    found = Model(name, model.number("context"), model.number("max_tokens"), model.flag("vision"))
    model.check_spelling()
    return found if name else None


def parse_transformer(entry, models, known):
    """(use, model_use) of a provider's "transformer"."""
    section, model_use = entry.section("transformer"), {}
    for key in [key for key in section.raw if key != "use"]:
        listed = named(models, key)
        if models and not listed:
            section.warn(key, "the provider does not list this model%s" % did_you_mean(key, [model.name for model in models]))
        model_use[listed.name if listed else key] = parse_use(section.section(key), known)
    return (parse_use(section, known) if "use" in section.raw else None), model_use


def parse_use(section, known):
    """((name, options), ...) of the items "name" and ["name", {options}] of a "use" list."""
    found = []
    for i, item in enumerate(section.items("use", "transformers")):
        key, (name, *more) = "use[%d]" % i, item if isinstance(item, list) and item else [item]
        if not isinstance(name, str) or more[1:] or not all(isinstance(options, dict) for options in more):
            section.fault(key, "expected \"name\" or [\"name\", {options}], got %s" % shown(item))
            continue
        if known is not None and name.lower() not in [other.lower() for other in known]:
            section.warn(key, "no transformer is called %s%s; it is ignored" % (shown(name), did_you_mean(name, known)))
        found.append((name, section.resolve(key, more[0] if more else {})))
    return tuple(found)


def parse_headers(entry) -> dict:
    """The provider's own headers. Their values may be keys: no message shows them, and no log those that look secret."""
    section, headers = entry.section("headers"), {}
    for name, value in section.raw.items():
        may_be = re.fullmatch(r"(?!(host|content-length|transfer-encoding|connection)$)[\w!#$%&'*+.^`|~-]+", name, re.A | re.I)
        if not may_be or not isinstance(value, str) or CONTROL_CHARACTER.search(value):
            section.fault(name, "this header cannot be set here, or its value is no string without control characters")
            continue
        headers[name] = section.resolve(name, value)
        if re.search(r"auth|key|token|secret|cookie", name, re.I):
            entry.notes.keep(headers[name])
    return headers


def parse_router(section, config, names) -> dict:
    """{rule: ("provider,model", ...), "longContextThreshold": n, "thinkRule": word} of what is set; blank is not set."""
    router = {rule: parse_targets(section, rule, config, names) for rule in ROUTES}
    router["longContextThreshold"] = section.number("longContextThreshold")
    router["thinkRule"] = section.choice("thinkRule", ("auto", "always"))
    section.check_spelling()
    return {rule: value for rule, value in router.items() if value}


def parse_targets(section, key, config, names) -> tuple:
    """The targets of a route or a list of routes, each once. names: of all providers, also those with faults of their own."""
    value, found = section.value(key), []
    for i, item in enumerate(value if isinstance(value, list) else [value]):
        at, text = "%s[%d]" % (key, i) if isinstance(value, list) else key, item if isinstance(item, str) else ""
        name, _, model = map(str.strip, text.partition(","))
        target = config.target(text)
        if target:
            found.append(target_name(target))
            check_listed(section, at, item, *target)
        elif name and model:
            if name.lower() not in [other.lower() for other in names]:
                section.fault(at, no_provider(name, config))
        elif item:
            owner = config.owner(text.strip())
            hint = " (did you mean %s?)" % shown(target_name(owner)) if owner else ""
            section.fault(at, "expected \"provider,model\", got %s%s" % (shown(item), hint))
    return tuple(dict.fromkeys(found))


def no_provider(name: str, config) -> str:
    """The words for a provider that does not exist."""
    names = [provider.name for provider in config.providers]
    return "no provider is called %s%s; configured: %s" % (shown(name), did_you_mean(name, names), ", ".join(names) or "none")


def check_listed(section, at, text, provider, model):
    """Warns of a route to a model that its provider does not list: it may work, it may be a slip."""
    listed = [other.name for other in provider.models]
    if listed and model not in listed:
        section.warn(at, "%s names a model that provider %s does not list%s (it has: %s%s)" % (
            shown(text), shown(provider.name), did_you_mean(model, listed), ", ".join(listed[:8]), ", ..." if listed[8:] else ""))


def with_default(router, section, config) -> dict:
    """The router with a default: without one, the first model of the first provider."""
    if section.raw.get("default") or not config.providers:      # it is there, or what is wrong has been said
        return router
    default = next((target_name((provider, model.name)) for provider in config.providers for model in provider.models), None)
    if default is None:
        section.fault("default", "is missing, and no provider lists a model that could be the default")
        return router
    if not config.is_demo:
        section.warn("default", "is missing; %s is the default" % shown(default))
    return {**router, "default": (default,)}


def parse_fallback(top, config, names):
    """{rule: targets} of the rules that have a list; False when falling back is switched off."""
    if isinstance(top.value("fallback"), bool):
        return {} if top.raw["fallback"] else False
    section = top.section("fallback")
    fallback = {rule: parse_targets(section, rule, config, names) for rule in FALLBACK_RULES}
    section.check_spelling()
    return {rule: targets for rule, targets in fallback.items() if rule in section.raw}


def parse_host(top, apikey) -> str:
    """HOST; without an APIKEY only this machine is let in."""
    host = (top.text("HOST") or "127.0.0.1").strip("[]")
    if apikey or is_loopback(host):
        return host
    top.warn("HOST", "%s needs an APIKEY; without one ccr listens on 127.0.0.1 only" % shown(host))
    return "127.0.0.1"


def is_loopback(host) -> bool:
    return bool(re.fullmatch(r"localhost|127(\.\d{1,3}){3}|::1", host, re.I))


def parse_proxy(top):
    """The proxy under any of claude-code-router's names. The environment's is read elsewhere, but its password is a secret."""
    for name in ("HTTPS_PROXY", "https_proxy"):
        top.notes.keep_password(top.notes.env.get(name, ""))
    return next(filter(None, [top.proxy(key) for key in ("PROXY_URL", "HTTPS_PROXY", "https_proxy", "httpsProxy")]), None)


def python_only(section, key, is_required=False):
    """The path under this key; None, with a warning, when it leads to a JavaScript file made for claude-code-router."""
    path = section.text(key, is_required)
    if path and re.search(r"\.[cm]?js$", path, re.I):
        return section.warn(key, "%s is JavaScript, which ccr does not run; it is ignored, write it in Python" % shown(path))
    return path


def parse_own_transformers(top) -> tuple:
    """({"path", "options"}, ...) of the owner's own Python transformers."""
    found = []
    for item in top.sections("transformers"):
        path, options = python_only(item, "path", True), item.section("options")
        if path:
            found.append({"path": path, "options": item.resolve("options", options.raw)})
    return tuple(found)


def parse_status_line(top) -> dict:
    """StatusLine with its variables: {"enabled", "currentStyle", STYLE: {"modules": [{...}]}}."""
    section = top.section("StatusLine")
    section.flag("enabled"), section.text("currentStyle")
    for key in [key for key, value in section.raw.items() if isinstance(value, dict)]:
        section.section(key).sections("modules")
    return resolved(section.raw, top.notes.env, [])


def parse_web_search(top):
    """{"engine", "api_key", "url", "max_results"}, or None when no search engine is configured."""
    section = top.section("WebSearch")
    if not section.raw:
        return None
    engine = section.choice("engine", tuple(SEARCH_ENGINES))
    found = {"engine": engine, "api_key": section.secret("api_key", section.warn), "url": section.url("url"),
             "max_results": section.number("max_results", 1, 50) or 8}
    for key in SEARCH_ENGINES.get(engine, ("engine",)):
        if not section.raw.get(key):
            section.fault(key, "is missing" + ("; %s needs it" % engine if engine else ", one of %s" % ", ".join(SEARCH_ENGINES)))
    section.check_spelling()
    return found


def parse_prices(top, config) -> dict:
    """{"provider,model": (input, cached, output)}, per million tokens."""
    section, prices = top.section("prices"), {}
    for key, value in section.raw.items():
        target = config.target(key)
        if not (isinstance(value, list) and len(value) == 3 and all(type(n) in (int, float) and n >= 0 for n in value)):
            section.fault(key, "expected [input, cached, output] per million tokens, got %s" % shown(value))
        elif target:
            prices[target_name(target)] = tuple(value)
        else:
            section.warn(key, "no such provider; this price is ignored")
    return prices


# --- reading an object with all its faults

VARIABLE = Pattern(r"\$(\$|\{[A-Z_][A-Z0-9_]*\}|[A-Z_][A-Z0-9_]*)")
CONTROL_CHARACTER = Pattern(r"[\x00-\x1f\x7f]")


class Notes:
    """What reading a config finds besides its values."""

    def __init__(self, env):
        self.env, self.problems, self.warnings, self.secrets = env, [], [], set()

    def raise_faults(self):
        if self.problems:
            raise ConfigError(self.problems)

    def keep(self, secret):
        secret = secret[7:].strip() if secret.startswith("Bearer ") else secret
        if len(secret) >= 8:        # a shorter one would scrub innocent text
            self.secrets.add(secret)

    def keep_password(self, url):
        """Notes the password of a URL as a secret."""
        password = url.rpartition("@")[0].rpartition("/")[2].partition(":")[2]
        if password:
            from urllib.parse import unquote
            self.keep(unquote(password))    # the log's scrubber knows how it is quoted


class Section:
    """One object of the config. A getter gives a value of its type, or None; what is wrong it notes by the key's path."""

    def __init__(self, raw, path, notes):
        self.path, self.notes, self.known, self.raw = path, notes, set(), raw if isinstance(raw, dict) else {}
        if not isinstance(raw, dict):
            notes.problems.append("%s: expected an object {...}, got %s" % (path or "config", shown(raw)))

    def at(self, key):
        return "%s.%s" % (self.path, key) if self.path else key

    def fault(self, key, words):
        self.notes.problems.append("%s: %s" % (self.at(key), words))

    def warn(self, key, words):
        self.notes.warnings.append("%s: %s" % (self.at(key), words))

    def wrong(self, key, expected):
        unset = []
        resolved(self.raw.get(key), self.notes.env, unset)
        hint = " (the environment variable %s is not set)" % unset[0] if unset else ""
        self.fault(key, "expected %s, got %s%s" % (expected, shown(self.raw.get(key)), hint))

    def resolve(self, key, value):
        """The value with its variables; those that are not set stay as they are, with a warning."""
        unset = []
        value = resolved(value, self.notes.env, unset)
        for name in unset:
            self.warn(key, "the environment variable %s is not set" % name)
        return value

    def value(self, key):
        self.known.add(key)
        value = self.resolve(key, self.raw.get(key))
        return None if value == "" else value

    def text(self, key, is_required=False):
        value = self.value(key)
        if value is not None and (not isinstance(value, str) or CONTROL_CHARACTER.search(value)):
            return self.wrong(key, "a string without control characters")
        text = (value or "").strip()
        return self.fault(key, "is missing") if is_required and not text else text or None

    def url(self, key, is_required=False):
        url = self.text(key, is_required)
        match = URL.fullmatch(url or "")
        if url and not (match and int((match[2] or ":0")[1:]) < 65536):
            return self.wrong(key, "a URL that begins with http:// or https://, without a login")
        for secret in re.findall(r"[?&][^=&]*(?:key|token)[^=&]*=([^&#]+)", url or "", re.I):
            self.notes.keep(secret)
        return url

    def proxy(self, key):
        """The URL of a proxy, with its login."""
        url = self.text(key)
        url = "http://" + url if url and "://" not in url else url
        self.notes.keep_password(url or "")
        is_good = not url or URL.fullmatch(re.sub(r"//[^/]*@", "//", url))
        return url if is_good else self.wrong(key, "the URL of an http or https proxy")

    def flag(self, key):
        value = self.value(key)
        word = str(value).strip().lower()
        return None if value is None else word == "true" if word in ("true", "false") else self.wrong(key, "true or false")

    def number(self, key, low=1, high=10 ** 9):
        """A whole number, also when written as a string."""
        value = self.value(key)
        match = re.fullmatch(r"\s*([0-9]{1,10})(\.0)?\s*", str(value))    # Python reads 6e5 as 600000.0
        if value is None or match and low <= int(match[1]) <= high:
            return match and int(match[1])
        return self.wrong(key, "a whole number from %d to %d" % (low, high))

    def choice(self, key, words):
        word = (self.text(key) or "").lower()
        return word if word in words else self.wrong(key, "one of " + ", ".join(words)) if word else None

    def items(self, key, of="values"):
        self.known.add(key)
        value = self.raw.get(key)
        return value if isinstance(value, list) else [] if value is None else self.wrong(key, "a list of " + of) or []

    def section(self, key, raw=None):
        self.known.add(key)
        raw = self.raw.get(key) if raw is None else raw
        return Section({} if raw is None else raw, self.at(key), self.notes)

    def sections(self, key):
        """The objects of a list."""
        return [Section(item, "%s[%d]" % (self.at(key), i), self.notes) for i, item in enumerate(self.items(key, "objects"))]

    def keys(self, key, on_unset=None):
        """The API keys here, one or a list; blank is none, and one whose variable is not set is left out."""
        self.known.add(key)
        value, found = self.raw.get(key), []
        for item in value if isinstance(value, list) else [value]:
            unset = []
            text = resolved("" if item is None else item, self.notes.env, unset)
            if not isinstance(text, str):
                self.fault(key, "expected a string")
            elif CONTROL_CHARACTER.search(text.strip()) or not text.isascii():
                self.fault(key, "holds a character that cannot stand in a key")
            elif unset:
                (on_unset or self.warn)(key, "the environment variable %s is not set, so there is no key" % unset[0])
            elif text.strip():
                found.append(text.strip())
                self.notes.keep(text.strip())
        return tuple(dict.fromkeys(found))

    def secret(self, key, on_unset=None):
        """One key or None. A variable that is not set is a fault: it must not come to mean that anyone may enter."""
        if isinstance(self.raw.get(key), list):
            return self.wrong(key, "a string")
        return next(iter(self.keys(key, on_unset or self.fault)), None)

    def check_spelling(self):
        """Warns of unknown keys that look like slips; any other unknown key is somebody else's business."""
        for key in [key for key in self.raw if key not in self.known]:
            hint = did_you_mean(key, self.known, 0.8)
            if hint:
                self.warn(key, "unknown key" + hint)


PLAIN_KEYS = (      # field of Config, key, how it is read
    ("port", "PORT", Section.number, 0, 65535),
    ("log", "LOG", Section.flag),
    ("log_level", "LOG_LEVEL", Section.choice, LOG_LEVELS),
    ("non_interactive", "NON_INTERACTIVE_MODE", Section.flag),
    ("claude_path", "CLAUDE_PATH", Section.text),
    ("custom_router_path", "CUSTOM_ROUTER_PATH", python_only),
    ("rewrite_system_prompt", "REWRITE_SYSTEM_PROMPT", Section.text),
    ("force_image_agent", "forceUseImageAgent", Section.flag),
    ("watch", "WATCH", Section.flag),
)


def resolved(value, env: dict, unset: list):
    """The value with $NAME and ${NAME} in its strings replaced, once, and $$ by $. What is not set (or empty) stays, noted."""
    def variable(match):
        name = match[1].strip("{}")
        if name != "$" and not env.get(name):
            unset.append(name)
            return match[0]
        return env[name] if name != "$" else "$"
    if isinstance(value, str):
        return VARIABLE.sub(variable, value)
    if isinstance(value, list):
        return [resolved(item, env, unset) for item in value]
    return {key: resolved(item, env, unset) for key, item in value.items()} if isinstance(value, dict) else value


def shown(value) -> str:
    """A value as it may stand in a message: short, ASCII, without a login or a key in a URL."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    text = re.sub(r"//[^/@]*@", "//***@", json.dumps(value))
    text = re.sub(r"([?&][^=&]*(?:key|token)[^=&]*=)[^&\"]+", r"\1***", text, flags=re.I)
    return text if len(text) <= 100 else text[:97] + "..."


def did_you_mean(name: str, names, cutoff=0.65) -> str:
    """' (did you mean "x"?)' with the one of `names` that is most like this one, in any case; ''."""
    from difflib import get_close_matches
    lower = {other.lower(): other for other in sorted(names, reverse=True)}
    near = get_close_matches(name.lower(), list(lower), 1, cutoff)
    return " (did you mean %s?)" % shown(lower[near[0]]) if near else ""


# --- JSON as people write it

JSON_TOKEN = Pattern(r"""
    (?P<space>  [\s\ufeff]+ | //[^\n\r\u2028\u2029]* | /\*.*?\*/ ) |
    (?P<string> '[^'\\\r\n]*(?:\\(?:\r\n|.)[^'\\\r\n]*)*' | "[^"\\\r\n]*(?:\\(?:\r\n|.)[^"\\\r\n]*)*" ) |
    (?P<key>    (?:[^\W\d]|\$)[\w$]* (?=\s*:) ) |
    (?P<mark>   [{}\[\]:,] | (?:true|false|null)(?![\w$]) ) |
    (?P<number> [+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)? (?![\w.$]) ) |
    (?P<other>  [\w$+-]+ | /\*.* | . )""", re.X | re.S)
STRING_PART = Pattern(r"\\\r\n|\\.|\"", re.S)
STRING_ESCAPES = {"\\'": "'", "\"": "\\\"", "\\\n": "", "\\\r": "", "\\\r\n": ""}
JSON_FAULTS = {                         # json's words -> ours; others stay
    "Expecting ',' delimiter": "expected a comma or the end of the {...} or [...]",
    "Expecting ':' delimiter": "expected a colon after the key",
    "Expecting property name enclosed in double quotes": "expected a key or }",
    "Expecting value": "expected a value",
    "Extra data": "expected the end of the file",
}


def parse_json5(text: str):
    """The value of a JSON or JSON5 text (comments, trailing commas, bare keys, single quotes ...); ConfigError with its place."""
    try:
        return json.loads(text, parse_constant=int)         # int("NaN") fails: it is no number that a config can hold
    except (ValueError, RecursionError):
        pass
    pieces = []                                 # (strict JSON, the place in the text of what it stands for, that in words)
    for match in JSON_TOKEN.finditer(text):
        kind, token = match.lastgroup, match[0]
        if token in ("}", "]") and pieces and pieces[-1][0] == ",":
            pieces.pop()
        if kind != "space":
            told = "a string" if kind == "string" else token if len(token) < 16 else "a long word"    # it may be a key
            pieces.append((JSON_PIECE[kind](token), match.start(), told))
    pieces.append(("", len(text.rstrip()), "the end of the file"))
    try:
        return json.loads("\n".join(piece for piece, _, _ in pieces), strict=False)
    except json.JSONDecodeError as e:
        _, place, found = pieces[e.lineno - 1]
        where = text.count("\n", 0, place) + 1, place - text.rfind("\n", 0, place)
        raise ConfigError(["line %d, column %d: %s, found %s" % (*where, JSON_FAULTS.get(e.msg, e.msg), found)]) from None
    except (ValueError, RecursionError):
        raise ConfigError(["config: a number in it is too long, or it is nested too deeply"]) from None


def json_string(token: str) -> str:
    return "\"%s\"" % STRING_PART.sub(lambda match: STRING_ESCAPES.get(match[0], match[0]), token[1:-1])


JSON_PIECE = {                          # a token -> the same in strict JSON; "?" is for json to complain of
    "string": json_string, "key": json.dumps, "mark": str, "other": lambda token: "?",
    "number": lambda token: token.lstrip("+") if token.strip("+-").isdigit() else repr(float(token)),
}


# === 3. Events =====================================================================

def new_id(prefix: str) -> str:
    """A fresh id. Clients merge answers that share one, and loop: never take a provider's."""
    return prefix + os.urandom(12).hex()


def empty_usage(input_tokens=0) -> dict:
    return {"input_tokens": input_tokens, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": 0}


def merge_usage(old: dict, new: dict) -> dict:
    """`old` with the counts of `new` that are told; a count that is None is not told."""
    return {**(old or {}), **{key: value for key, value in (new or {}).items() if value is not None}}


class Spliced(NamedTuple):
    """A run of plain deltas, already in the client's bytes (see Shortcut): every stage passes it on as it is."""
    data: bytes
    kind: object     # "text", "thinking" or ("tool", key)
    body: bytes      # the joined text of the deltas, as the inside of a JSON string


class Block:
    """A content block on its way: what has come of it, and what was already told."""
    __slots__ = ("kind", "key", "id", "name", "parts", "signature", "content", "checked", "is_whole")

    def __init__(self, kind, key=None, content=None):
        self.kind, self.key, self.content = kind, key, content
        self.id = self.name = self.signature = None
        self.parts, self.checked, self.is_whole = [], 0, False

    def is_done(self) -> bool:
        """Another block may follow. A call is done when its arguments are a whole JSON object."""
        if self.kind != "tool":
            return True
        if self.checked != len(self.parts):
            self.checked = len(self.parts)
            self.is_whole = self.parts[-1].rstrip().endswith("}") and is_json_object("".join(self.parts))
        return self.is_whole


def is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


class BlockWriter:
    """Well-formed, correctly numbered Anthropic events, whatever order a parser reports things in.

    Each method returns the list of events that can be told now. One block is open at a time: what comes for another one
    while a call's arguments are incomplete waits for its turn (providers interleave parallel calls).
    """

    def __init__(self, message_id: str, model: str, input_tokens: int = 0):
        self.message = {"id": message_id, "type": "message", "role": "assistant", "model": model, "content": [],
                        "stop_reason": None, "stop_sequence": None, "usage": empty_usage(input_tokens)}
        self.is_started = False
        self.index = -1
        self.current = None       # the open Block
        self.waiting = []         # Blocks in order of appearance
        self.calls = {}           # key -> Block, open, waiting or closed
        self.ids = set()

    @property
    def has_content(self) -> bool:
        return self.index >= 0 or bool(self.waiting)

    @property
    def open(self):
        """(kind, key) of the open block, or None."""
        return self.current and (self.current.kind, self.current.key)

    def start(self) -> list:
        if self.is_started:
            return []
        self.is_started = True
        return [{"type": "message_start", "message": self.message}]

    def text(self, text) -> list:
        return self._add("text", text) if text else []

    def thinking(self, text) -> list:
        return self._add("thinking", text) if text else []

    def signature(self, signature) -> list:
        """Signs the thinking block at hand, or an empty one of its own where there is none."""
        if not signature:
            return []
        block = self.waiting[-1] if self.waiting else self.current
        if block is None or block.kind != "thinking" or block.signature:
            block = Block("thinking")
            self.waiting.append(block)
        block.signature = signature
        return [self._delta("signature_delta", "signature", signature)] if block is self.current else self._advance()

    def tool(self, key, id=None, name=None, args="") -> list:
        """Reports a fragment of the call `key`; id and name may come with any fragment."""
        block = self.calls.get(key)
        if block is None:
            block = self.calls[key] = Block("tool", key)
            self.waiting.append(block)
        block.id, block.name = block.id or id, block.name or name
        if args == "null" and not block.parts:    # some providers say null for a call without arguments
            args = ""
        if block is self.current:
            if not args:
                return []
            block.parts.append(args)
            return [self._delta("input_json_delta", "partial_json", args)]
        if args and block not in self.waiting:
            if args.strip() and args != "".join(block.parts):
                raise ApiError(502, "the provider sent arguments for the call of %s after they were complete" % block.name)
            return []
        if args:
            block.parts.append(args)
        return self._advance()

    def block(self, content: dict) -> list:
        """A whole block of any other type."""
        self.waiting.append(Block("block", content=content))
        return self._advance()

    def note(self, spliced: Spliced) -> None:
        """Takes note of deltas that went by in the client's own bytes."""
        if self.current is not None and self.current.kind == "tool":
            self.current.parts.append(json.loads(b'"' + spliced.body + b'"'))

    def finish(self, stop_reason=None, usage=None, stop_sequence=None) -> list:
        """Closes what is open, tells what still waits, and ends the message."""
        events = self.start() + self._advance(at_end=True) + self._close()
        if self.calls and stop_reason in (None, "end_turn"):
            stop_reason = "tool_use"
        elif not self.calls and stop_reason == "tool_use":
            stop_reason = "end_turn"
        events.append({"type": "message_delta", "delta": {"stop_reason": stop_reason or "end_turn",
                                                          "stop_sequence": stop_sequence},
                       "usage": merge_usage(self.message["usage"], usage)})
        events.append({"type": "message_stop"})
        return events

    def _add(self, kind, text) -> list:
        block = self.waiting[-1] if self.waiting else self.current
        if block is None or block.kind != kind or block.signature:
            block = Block(kind)
            self.waiting.append(block)
        if block is self.current:
            return [self._delta(*DELTAS[kind], text)]
        block.parts.append(text)
        return self._advance()

    def _advance(self, at_end=False) -> list:
        events = []
        while self.waiting:
            block = self.waiting[0]
            if self.current is not None and not at_end and not self.current.is_done():
                break
            if block.kind == "tool" and not block.name:
                if not at_end:
                    break
                raise ApiError(502, "the provider sent a tool call without a name")
            events += self.start() + self._close() + self._open(self.waiting.pop(0))
        return events

    def _open(self, block) -> list:
        self.current, self.index = block, self.index + 1
        events = [{"type": "content_block_start", "index": self.index, "content_block": self._first(block)}]
        if block.kind in DELTAS and block.parts:
            events.append(self._delta(*DELTAS[block.kind], "".join(block.parts)))
        if block.signature:
            events.append(self._delta("signature_delta", "signature", block.signature))
        return events

    def _first(self, block) -> dict:
        if block.kind == "text":
            return {"type": "text", "text": ""}
        if block.kind == "thinking":
            return {"type": "thinking", "thinking": "", "signature": ""}
        if block.kind == "block":
            return block.content
        if not block.id or block.id in self.ids:    # two calls with one id could not be told apart in the next request
            block.id = new_id("toolu_")
        self.ids.add(block.id)
        return {"type": "tool_use", "id": block.id, "name": block.name, "input": {}}

    def _delta(self, type, member, text) -> dict:
        return {"type": "content_block_delta", "index": self.index, "delta": {"type": type, member: text}}

    def _close(self) -> list:
        if self.current is None:
            return []
        self.current = None
        return [{"type": "content_block_stop", "index": self.index}]


DELTAS = {    # kind of block -> (delta type, its member)
    "text":     ("text_delta", "text"),
    "thinking": ("thinking_delta", "thinking"),
    "tool":     ("input_json_delta", "partial_json"),
}


def unfold(message: dict):
    """The message told as a stream; fold() makes the same message of it again."""
    ends = {key: message[key] for key in ("stop_reason", "stop_sequence") if key in message}
    yield {"type": "message_start", "message": {**message, "content": [], **{key: None for key in ends}}}
    for index, block in enumerate(message.get("content") or []):
        first, deltas = unfold_block(block)
        yield {"type": "content_block_start", "index": index, "content_block": first}
        for delta in deltas:
            yield {"type": "content_block_delta", "index": index, "delta": delta}
        yield {"type": "content_block_stop", "index": index}
    yield {"type": "message_delta", "delta": ends, "usage": message.get("usage") or {}}
    yield {"type": "message_stop"}


def unfold_block(block: dict) -> tuple:
    """(content_block of the start event, its deltas)."""
    kind = block.get("type")
    if kind == "text" and block.get("text"):
        return {**block, "text": ""}, [{"type": "text_delta", "text": block["text"]}]
    if kind == "thinking" and "thinking" in block:
        deltas = [{"type": "thinking_delta", "thinking": block["thinking"]}] if block["thinking"] else []
        if block.get("signature"):
            deltas.append({"type": "signature_delta", "signature": block["signature"]})
        return {**block, "thinking": "", **({"signature": ""} if "signature" in block else {})}, deltas
    if kind in ("tool_use", "server_tool_use") and block.get("input"):
        return {**block, "input": {}}, [{"type": "input_json_delta", "partial_json": json.dumps(block["input"])}]
    return block, []


def fold(events) -> dict:
    """The message that a stream of events tells.

    Raises ApiError(502) for a call whose arguments are no JSON object, and for a stream that tells no message.
    """
    message, blocks, partial = None, {}, collections.defaultdict(list)
    for event in events:
        kind, index = event["type"], event.get("index")
        if kind == "message_start":
            message = dict(event["message"])
        elif kind == "content_block_start":
            blocks[index] = dict(event["content_block"])
        elif kind == "content_block_delta":
            fold_delta(blocks[index], event["delta"], partial[index])
        elif kind == "content_block_stop" and partial.get(index):
            seal_block(blocks[index], partial.pop(index))
        elif kind == "message_delta":
            message.update(event.get("delta") or {})
            if event.get("usage"):
                message["usage"] = merge_usage(message.get("usage"), event["usage"])
    if message is None:
        raise ApiError(502, "the provider's reply holds no message")
    message["content"] = [blocks[index] for index in sorted(blocks)]
    return message


def fold_delta(block: dict, delta: dict, partial: list) -> None:
    kind = delta.get("type")
    if kind == "signature_delta":
        block["signature"] = delta["signature"]
    elif kind == "citations_delta":
        block["citations"] = (block.get("citations") or []) + [delta["citation"]]
    else:    # text, thinking, partial_json: pieces, joined once
        partial.append(delta.get("text") or delta.get("thinking") or delta.get("partial_json") or "")


def seal_block(block: dict, partial: list) -> None:
    member = {"text": "text", "thinking": "thinking"}.get(block.get("type"), "input")
    whole = "".join(partial)
    if member != "input":
        block[member] = (block.get(member) or "") + whole
    elif whole:
        block["input"] = parse_input(whole, block.get("name"))


def parse_input(text: str, name: str) -> dict:
    """The arguments of a call; ApiError(502) if they are no JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ApiError(502, "the model's call of %s has arguments that are not JSON: %s" % (name, e))
    if not isinstance(value, dict):
        raise ApiError(502, "the model's call of %s has arguments that are no JSON object" % name)
    return value


# === 4. SSE ========================================================================

MAX_EVENT_BYTES = 64 << 20


def decode_sse(chunks, shortcut=None):
    """The data of each server-sent event, as bytes, from bytes that are cut anywhere.

    Lenient where providers are: CRLF, no space after the colon, comments, other fields, data over several lines, a last event
    without its blank line, one event a line without blank lines between. `event: error` with bare data becomes {"error": ...}.
    With a Shortcut, runs of plain deltas come as Spliced. ApiError(502) for an event over 64 MB.
    """
    data, name, pieces, size = [], b"", [], 0
    for chunk in itertools.chain(chunks, [b""]):    # the last is for what passed since
        if shortcut is not None and shortcut.passed:
            yield shortcut.told()
        size += len(chunk)
        if size > MAX_EVENT_BYTES:
            raise ApiError(502, "the provider sent an event of more than %d MB" % (MAX_EVENT_BYTES >> 20))
        if b"\n" not in chunk:
            pieces.append(chunk)
            if shortcut is not None:
                shortcut.is_between = False
            continue
        buffer = b"".join(pieces) + chunk if pieces else chunk
        start = begin = 0
        while True:
            if shortcut is not None and not data and not name:
                spliced, start = shortcut.take(buffer, start)
                if spliced is not None:
                    begin = start
                    yield spliced
            end = buffer.find(b"\n", start)
            if end < 0:
                break
            line, start = buffer[start:end], end + 1
            if line[-1:] == b"\r":
                line = line[:-1]
            if not line:
                if data:
                    if shortcut is not None and len(data) == 1:
                        shortcut.frame = (data[0], buffer[begin:start])
                    yield named_data(name, data)
                data, name, begin = [], b"", start
            elif line[:5] == b"data:":
                line = line[6:] if line[5:6] == b" " else line[5:]
                if data and is_whole_frame(data[-1]) and line[:1] in (b"{", b"["):
                    yield named_data(name, data)
                    data = []
                data.append(line)
            elif line[:6] == b"event:":
                name = line[6:].strip()
        if shortcut is not None:
            shortcut.is_between = begin == start == len(buffer)
        pieces = [buffer[start:]] if start < len(buffer) else []
        size = len(buffer) - start + sum(map(len, data))
    rest = b"".join(pieces)
    if rest[:5] == b"data:":
        data.append(rest[5:].strip())
    if data and data != [b""]:
        yield named_data(name, data)


def named_data(name: bytes, data: list) -> bytes:
    payload = data[0] if len(data) == 1 else b"\n".join(data)
    if name == b"error" and b'"error"' not in payload:
        return dump_json({"error": {"message": payload.decode("utf-8", "replace")}})
    return payload


def is_whole_frame(data: bytes) -> bool:
    """A line of data that stands for itself: some servers leave out the blank line between events."""
    if data == b"[DONE]":
        return True
    if data[:1] != b"{" or data[-1:] != b"}":
        return False
    try:
        json.loads(data)
        return True
    except (ValueError, RecursionError):
        return False


def parse_json(data, what="the provider's reply"):
    """The value of a JSON text; ApiError(502) in words if it is none."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as e:
        shown = bytes(data[:120]).decode("utf-8", "replace")
        raise ApiError(502, "%s is not JSON (%s): %s" % (what, e if isinstance(e, json.JSONDecodeError) else type(e).__name__,
                                                         shown))


def dump_json(value) -> bytes:
    """Compact JSON in ASCII: quick, and safe for lone surrogates. ValueError for NaN."""
    return ENCODER.encode(value).encode("ascii")


def encode_event(event: dict) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (event["type"].encode("ascii", "backslashreplace"), dump_json(event))


def encode_data(value) -> bytes:
    return b"data: %s\n\n" % dump_json(value)


ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False, check_circular=False)

# --- The short cut for plain deltas

SHORTCUT = True    # False sends every frame the general way, for bisecting
SHORTCUT_TRIES = 4    # frames that change beyond their text (counters, padding) are not learned for ever
STRING_BODY = rb'[^"\\\x00-\x1f]*(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\x00-\x1f]*)*'
BODIES = Pattern(b"(?:(?!\n)" + STRING_BODY + b"\n)*")    # none is empty: such a delta is no event
SWEEP = 200    # frames at once: where a run ends soon, the rest of the buffer is not split for nothing


class Shortcut:
    """Copies plain deltas through without parsing them, once it has seen how one is translated.

    A frame that gave exactly one delta of the same text teaches the bytes before and after that text, on both sides. It is
    proved by parsing the frame once more with a probe in place of the text. Frames with these very bytes around one JSON string
    then go through in one sweep: head + BODY + tail -> client's head + BODY + client's tail. Anything else goes the general way
    and makes it forget.
    """

    def __init__(self, plain_delta):
        self.plain_delta = plain_delta    # of the provider's format: parsed frame -> (kind, text) or None
        self.frame = None                 # (data, the raw bytes of the whole event) of the frame under way
        self.events = []                  # what it was translated to
        self.head = None                  # the bytes before the text, while there is something to go by
        self.tries = SHORTCUT_TRIES
        self.is_between = False           # all bytes so far were whole events
        self.passed = []                  # what went to the client by a Lane, past the other stages

    def may_pass(self) -> bool:
        """Whether plain deltas may go to the client without their frames being seen one by one (see DeltaLoop)."""
        return self.is_between and self.head is not None and self.frame is None

    def pass_by(self, spliced) -> None:
        if spliced.body:
            self.passed.append(spliced.body)

    def told(self) -> Spliced:
        """What has passed since, for the stages that take note of it; its bytes are gone already."""
        body, self.passed = b"".join(self.passed), []
        return Spliced(b"", self.kind, body)

    def saw(self, event: dict) -> None:
        """Takes note of an event that went the general way."""
        self.events.append(event)

    def take(self, buffer: bytes, start: int) -> tuple:
        """(Spliced or None, where to go on in the buffer)."""
        if self.frame is not None:
            self._learn(*self.frame)
            self.frame, self.events = None, []
        if self.head is None or not buffer.startswith(self.head, start):
            return None, start
        bodies = buffer[start + len(self.head):].split(self.between, SWEEP)
        bodies[-1], is_whole, _ = bodies[-1].partition(self.tail)
        bodies = bodies if is_whole else bodies[:-1]
        text = b"\n".join(bodies) + b"\n"
        is_sound = text.count(b"\n") == len(bodies)    # else it is cut, or a line ends inside a string
        text = text[:BODIES.match(text).end()]
        if not is_sound or not text or not is_utf8(text):
            return None, start
        self.tries = SHORTCUT_TRIES
        count = text.count(b"\n")
        data = self.new_head + text[:-1].replace(b"\n", self.new_between) + self.new_tail
        body = text.replace(b"\n", b"") if type(self.kind) is tuple else b""
        return Spliced(data, self.kind, body), start + len(text) + count * (len(self.head) + len(self.tail) - 1)

    def _learn(self, data, raw) -> None:
        """Learns from a frame and the one event that came of it; forgets if it is not plain."""
        is_one = len(self.events) == 1 and self.events[0]["type"] == "content_block_delta"
        if is_one and self.head is not None and raw.startswith(self.head) and raw.endswith(self.tail):
            return    # it was only cut
        self.head = None
        if not is_one or self.tries <= 0:
            return
        self.tries -= 1
        (member, text), *more = [item for item in self.events[0]["delta"].items() if item[0] != "type"] or [(None, None)]
        if more or not text or not isinstance(text, str):
            return
        written = {json.dumps(text, ensure_ascii=is_ascii).encode("utf-8", "surrogatepass") for is_ascii in (True, False)}
        found = [string for string in written if raw.count(string) == 1]
        if len(found) != 1:
            return
        begin = raw.index(found[0]) + 1
        head, tail = raw[:begin], raw[begin + len(found[0]) - 2:]
        probe = "ccr probe" if text != "ccr probe" else "other probe"
        kind, probed = self.plain_delta(json.loads(data.replace(found[0], b'"%s"' % probe.encode()))) or (None, None)
        if probed != probe or DELTAS.get(kind if type(kind) is str else "tool") != (self.events[0]["delta"]["type"], member):
            return
        event = encode_event({**self.events[0], "delta": {**self.events[0]["delta"], member: "\x01"}})
        self.new_head, self.new_tail = event.split(b"\\u0001")
        self.new_between = self.new_tail + self.new_head
        self.head, self.tail, self.between, self.kind = head, tail, tail + head, kind


def is_utf8(data: bytes) -> bool:
    try:
        return data.isascii() or bool(data.decode("utf-8"))
    except UnicodeDecodeError:
        return False


# === 5. Formats ====================================================================

class Format(NamedTuple):
    """A wire format: as ingress, what a client speaks (the request is parsed, the reply rendered); as egress, what a provider
    speaks (the other way round). The pivot between them is Anthropic's own shape."""
    name: str
    parse_request: object      # body -> request; ApiError(400) that names the field
    render_request: object     # request -> body
    parse_message: object      # body -> message; ApiError if it is none
    render_message: object     # message, request -> body
    parse_stream: object       # frames, writer -> events; ApiError if the end mark is missing
    render_stream: object      # events, request -> bytes of whole frames
    endpoint: object           # api_base_url, model, stream -> URL
    auth: object               # key or None -> headers
    plain_delta: object = None     # parsed frame -> (kind, text) if it is nothing but one delta of this text
    render_error: object = None    # ApiError -> body
    stream_error: object = None    # ApiError -> the bytes that end a stream
    ping: bytes = b""              # a sign of life


# --- Errors of providers

def parse_error(status, raw: bytes, headers=None) -> ApiError:
    """The provider's refusal in its own words, whatever shape they come in: object, string, detail, list, HTML, text, nothing."""
    text = raw.decode("utf-8", "replace").strip()
    error = error_in(html_words(text) if text[:1] == "<" else json_or_text(text), status)
    error.retry_after = retry_after(headers or {}, text)
    return error


def error_in(value, status=None) -> ApiError:
    """The ApiError that a body or a frame tells. Without a status the body's own code or type says it, else it is 502.

    Context overflow becomes a 400 in words that Claude Code knows: on those it compacts, while anything else is asked again.
    """
    body = value[0] if isinstance(value, list) and value else value
    error = as_dict(as_dict(body).get("error") or body)
    if status is None:
        told = [str(error.get(key)).lower() for key in ("code", "status", "status_code", "type")]
        status = next((ERROR_WORDS[word] for word in told if word in ERROR_WORDS), 502)
    elif not 400 <= status <= 599:
        status = 502
    words = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", error_text(body)).strip()[:2000]
    words = words or "no words came with this error (status %d)" % status
    is_known = OVERFLOW.search(words)
    is_too_long = error.get("code") == "context_length_exceeded" or OTHER_OVERFLOW.search(words)
    if status != 429 and (is_known or is_too_long or status == 413 and "token" in words.lower()):
        status, words = 400, words if is_known else "prompt is too long: " + words
    return ApiError(status, words, details=as_dict(error.get("details")) or None)


def error_text(value, depth=6) -> str:
    """The readable words of an error body; its JSON if nothing in it looks like words."""
    if isinstance(value, list) and depth:
        return "; ".join(filter(None, (error_text(item, depth - 1) for item in value[:5])))
    if not isinstance(value, dict) or not depth:
        return as_text(value)
    words = next(filter(None, (error_text(value.get(key), depth - 1) for key in ERROR_KEYS)), "")
    if isinstance(value.get("loc"), list):                  # FastAPI: where in the body
        words = "%s: %s" % (".".join(str(step) for step in value["loc"] if isinstance(step, (str, int))), words)
    inner = as_dict(value.get("metadata")).get("raw")       # OpenRouter: what the provider behind it said
    if inner and inner != words:
        words = "%s: %s" % (words, error_text(json_or_text(inner), depth - 1))
    return words or (json.dumps(value) if value else "")


ERROR_KEYS = ("error", "message", "msg", "detail", "errors", "error_message", "error_msg", "error_description", "reason", "title")

ERROR_WORDS = {    # type, code or status of an error that came with status 200 -> the status it should have had
    **{kind: status for status, kind in ERROR_TYPES.items()}, **{str(status): status for status in range(400, 600)},
    "invalid_request_error": 400, "timeout_error": 504,
    "rate_limit_exceeded": 429, "insufficient_quota": 429, "resource_exhausted": 429, "unavailable": 503, "invalid_argument": 400,
    "context_length_exceeded": 400, "invalid_api_key": 401, "unauthenticated": 401, "permission_denied": 403, "not_found": 404,
    "model_not_found": 404, "api_error": 500, "server_error": 500, "internal": 500,
}

OVERFLOW = Pattern(    # what Claude Code 2.1.330 looks for in the message of a 400
    "prompt is too long|input length and `max_tokens` exceed context limit|maximum context length|context_length_exceeded"
    "|exceeds the context window|contextwindowexceedederror|longer than the maximum model length"
    "|longer than the model's context length|exceeds the available context size"
    "|exceeds the maximum number of tokens allowed|exceeded model token limit|input token length too long"
    "|input tokens exceed the configured limit|maximum context limit|maximum prompt length|prompt exceeds max length"
    "|tokens in request more than max tokens allowed|range of input length should be|context window exceeds limit"
    "|but model only supports up to|reduce the length of the messages|`inputs` tokens \\+ `max_new_tokens` must be"
    "|context exceeds your deployment", re.IGNORECASE)


OTHER_OVERFLOW = Pattern("input is too long for requested model|loaded with context length of only", re.I)    # what it does not


def html_words(text: str) -> str:
    return "a web page: " + " ".join(re.sub(r"<[^>]*>", " ", text[:4000]).split())[:200]


def json_or_text(value):
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def retry_after(headers, text=""):
    """Seconds as text, or None. A date counts from the provider's own Date; Google says it in the body."""
    value, in_ms = headers.get("retry-after") or "", headers.get("retry-after-ms") or ""
    if re.fullmatch(r"\d{1,7}(\.\d{1,6})?", value):
        return value
    if re.fullmatch(r"\d{1,10}", in_ms):
        return "%g" % (int(in_ms) / 1000)
    if value:
        from email.utils import parsedate_to_datetime
        try:
            wait = parsedate_to_datetime(value) - parsedate_to_datetime(headers.get("date") or "")
            return "%d" % max(0, wait.total_seconds())
        except (ValueError, TypeError, IndexError, OverflowError):
            return None
    told = re.search(r'"retryDelay": *"(\d{1,7})(?:\.\d*)?s"', text)
    return told[1] if told else None


# --- What the formats share

def as_dict(value) -> dict:
    return value if isinstance(value, dict) else {}


def dicts_in(value) -> list:
    """The objects of a list; providers put null and worse there."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def as_text(value) -> str:
    return value if isinstance(value, str) else ""


def expect(value, kinds: str, path: str):
    """The value if it is of one of these kinds, else ApiError(400) that names the field. "a string or a list?": or left out."""
    kind = KINDS[type(value)]
    if kind in kinds or value is None and kinds[-1] == "?":
        return value
    raise ApiError(400, "%s: expected %s, got %s" % (path, kinds.rstrip("?"), kind))


KINDS = {str: "a string", list: "a list", dict: "an object", int: "an integer", float: "a number", bool: "true or false",
         type(None): "nothing"}


def expect_fields(value, fields: dict, path="") -> None:
    for name, kinds in fields.items():
        expect(value.get(name), kinds, path + name)


def without_keys(value: dict, *keys) -> dict:
    return {key: item for key, item in value.items() if key not in keys} if any(key in value for key in keys) else value


def mapped(change, items: list) -> list:
    """The list with change(item) for each item; the very list if nothing changed."""
    new = [change(item) for item in items]
    return new if any(a is not b for a, b in zip(new, items)) else items


def dropped(value, path, is_top=True):
    """The value without the key at the end of the path, in every item of lists on its way; the very value if it is not there.

    A later step that is no key is passed over: validators name union tags too ("tools.custom.defer_loading").
    """
    if isinstance(value, list):
        return mapped(lambda item: dropped(item, path, False), value)
    if not isinstance(value, dict) or not path:
        return value
    key, rest = path[0], path[1:]
    if not rest:
        return without_keys(value, key)
    if not isinstance(value.get(key), (dict, list)):
        return value if is_top else dropped(value, rest, False)
    new = dropped(value[key], rest, False)
    return value if new is value[key] else {**value, key: new} if new else without_keys(value, key)


def remembered(name):
    """Decorates a function of a request that looks at this one member only: its last results are kept, by the member's identity.

    A session sends the same tools with each turn, and Memo gives them as the same object; nobody changes what they were given.
    """
    def decorate(function):
        kept = collections.OrderedDict()

        def recall(request):
            value = request.get(name)
            known = kept.get(id(value))
            if known is None or known[0] is not value:
                known = kept[id(value)] = value, function(request)
                if len(kept) > 16:
                    kept.popitem(last=False)
            return known[1]
        return functools.wraps(function)(recall)
    return decorate


def blocks_of(message: dict) -> list:
    """The content of a message as blocks."""
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return content or []


def text_of(content) -> str:
    """Content (string, blocks or None) as one text."""
    return content if isinstance(content, str) else lines(*map(block_text, content or []))


def lines(*texts) -> str:
    return "\n".join(filter(None, texts))


def block_text(block: dict) -> str:
    """What a block says, for a model that cannot be given it as it is: nothing vanishes without a trace or travels raw."""
    kind = block.get("type")
    if kind in BLOCK_TEXTS:
        return BLOCK_TEXTS[kind](block)
    if isinstance(block.get("text"), str):
        return block["text"]
    return "[%s: %s]" % (kind, brief(without_keys(block, "type", "cache_control")))


def brief(value) -> str:
    return json.dumps(value, ensure_ascii=False)[:1000]


def document_text(block) -> str:
    source, title = as_dict(block.get("source")), as_text(block.get("title"))
    if source.get("type") in ("text", "content"):
        return lines(title, as_text(block.get("context")), text_of(source.get("data") or source.get("content")))
    what = source.get("url") or source.get("media_type") or source.get("type") or "of unknown kind"
    return '[document%s (%s): this model cannot be shown it]' % (' "%s"' % title if title else "", what)


def search_text(block) -> str:
    """The links of a web search that was made earlier in the conversation."""
    content = block.get("content")
    if not isinstance(content, list):
        return "[web search failed: %s]" % as_dict(content).get("error_code")
    return lines("[web search results]", *("- %s: %s" % (item.get("title"), item.get("url")) for item in dicts_in(content)))


BLOCK_TEXTS = {    # type of block -> the words that stand for it
    "text": lambda block: as_text(block.get("text")),
    "image": lambda block: "[an image that this model cannot be shown]",
    "document": document_text,
    "search_result": lambda block: lines(*map(as_text, (block.get("title"), block.get("source"))), text_of(block.get("content"))),
    "tool_reference": lambda block: "Loaded tool: %s" % block.get("tool_name"),
    "tool_result": lambda block: lines("[result of a call that is not in this conversation]", result_parts(block)[0]),
    "server_tool_use": lambda block: "[%s: %s]" % (block.get("name"), brief(block.get("input"))),
    "web_search_tool_result": search_text,
    "thinking": lambda block: "",             # of another model: formats that can carry it do so themselves
    "redacted_thinking": lambda block: "",    # encrypted: only Anthropic can read it
}

ERROR_MARK = "[tool error] "
NO_RESULT = "[this call got no result]"


def result_parts(block: dict) -> tuple:
    """(text, image blocks) of a tool_result, for formats whose results are text; is_error is said in the text."""
    content = block.get("content")
    images = [item for item in content if item.get("type") == "image"] if isinstance(content, list) else []
    text = text_of([item for item in content if item.get("type") != "image"] if images else content)
    if images and not text:
        text = "(the image follows)" if len(images) == 1 else "(the images follow)"
    return (ERROR_MARK if block.get("is_error") else "") + text, images


def parsed_result(id, content) -> dict:
    """The tool_result of a text or of blocks in which only the mark says that the call failed."""
    if isinstance(content, str) and content.startswith(ERROR_MARK):
        return {"type": "tool_result", "tool_use_id": id, "content": content[len(ERROR_MARK):], "is_error": True}
    return {"type": "tool_result", "tool_use_id": id, "content": content}


def settled(messages: list) -> list:
    """The messages with each call's results right after it, first, together and in the order of the calls, and every result after
    its call. (Claude Code sends the results of parallel calls as they finish.)

    Text, images and role:system messages that came between follow. A call that was never answered gets a stand-in, a result
    without its call becomes text. What it makes of a conversation up to a user turn without pending calls does not depend on
    what follows.
    """
    out, i = [], 0
    while i < len(messages):
        message, i = messages[i], i + 1
        if message["role"] != "assistant" or not any(block.get("type") == "tool_use" for block in blocks_of(message)):
            out.append(without_orphans(message))
            continue
        while i < len(messages) and messages[i]["role"] == "assistant":    # one turn in two messages
            message, i = {**message, "content": blocks_of(message) + blocks_of(messages[i])}, i + 1
        calls = [block["id"] for block in blocks_of(message) if block.get("type") == "tool_use"]
        waiting, results, rest = list(calls), [], []
        while i < len(messages) and messages[i]["role"] != "assistant":
            others = []
            for block in blocks_of(messages[i]):
                if block.get("type") == "tool_result" and block.get("tool_use_id") in waiting:
                    waiting.remove(block["tool_use_id"])
                    results.append(block)
                else:
                    others.append(block)
            if others:
                is_whole = isinstance(messages[i]["content"], str)
                rest.append(messages[i] if is_whole else without_orphans({**messages[i], "content": others}))
            i += 1
        results += [{"type": "tool_result", "tool_use_id": id, "content": NO_RESULT} for id in waiting]
        results.sort(key=lambda result: calls.index(result["tool_use_id"]))
        if rest and rest[0]["role"] == "user" and "x-openai" not in rest[0]:
            results += blocks_of(rest.pop(0))
        out += [message, {"role": "user", "content": results}, *rest]
    return out


def without_orphans(message: dict) -> dict:
    """The message with its tool_results, which belong to no call, as text and images."""
    if isinstance(message.get("content"), str) or not any(block.get("type") == "tool_result" for block in blocks_of(message)):
        return message
    content = []
    for block in blocks_of(message):
        is_result = block.get("type") == "tool_result"
        content += [{"type": "text", "text": block_text(block)}, *result_parts(block)[1]] if is_result else [block]
    return {**message, "content": content}


def without_system_roles(messages: list) -> list:
    """The messages with each role:system one as text of the user in its place, and neighbours of one role made one.

    For models whose chat template wants the system first and then user and assistant in turn (Qwen 3.5, Gemma, Mistral), and for
    Anthropic-format providers that know no such role.
    """
    out = []
    for message in messages:
        if message["role"] == "system":
            message = {"role": "user", "content": "<system-reminder>\n%s\n</system-reminder>" % text_of(message.get("content"))}
        if out and out[-1]["role"] == message["role"]:
            blocks = blocks_of(out[-1]) + blocks_of(message)    # Anthropic refuses text between calls and their results
            message = {**out.pop(), "content": sorted(blocks, key=lambda block: block.get("type") != "tool_result")}
        out.append(message)
    return out


def system_texts(request: dict) -> list:
    """The system prompt's blocks that hold text, without Claude Code's billing header: it changes with each run, and with it the
    provider's prompt cache would be lost."""
    texts = []
    for block in blocks_of({"content": request.get("system")}):
        text = block_text(block)
        if text.startswith("x-anthropic-billing-header:"):
            text = text.partition("\n")[2]
        if text:
            texts.append({**block, "type": "text", "text": text})
    return texts


def system_blocks(request: dict) -> list:
    """The system prompt for another provider's model, and which tools it will not have."""
    missing = unavailable_tools(request)
    words = "These tools cannot be used with this model: %s." % ", ".join(missing)
    return system_texts(request) + [{"type": "text", "text": words}] * bool(missing)


def image_url(block: dict):
    """The address or data: URL of an image block; None for a file that only its provider has."""
    source = as_dict(block.get("source"))
    if source.get("type") == "base64":
        return "data:%s;base64,%s" % (source.get("media_type"), source.get("data"))
    return source.get("url")


def media_source(url: str) -> dict:
    """A `source` from an address or data: URL."""
    found = re.match(r"data:([^;,]*)(?:;[^,]*)?;base64,", url[:200])
    if found:
        return {"type": "base64", "media_type": found.group(1) or "application/octet-stream", "data": url[found.end():]}
    return {"type": "url", "url": url}


@remembered("tools")
def functions_of(request: dict) -> list:
    """The tools that a model of another provider can be given, each with a schema.

    Claude Code's placeholder for deferred tools is no tool; Anthropic's typed tools cannot run elsewhere (unavailable_tools).
    """
    return [{**tool, "input_schema": as_dict(tool.get("input_schema")) or {"type": "object", "properties": {}}}
            for tool in request.get("tools") or []
            if tool.get("name") and tool["name"] != PLACEHOLDER and tool.get("type") in (None, "custom")]


def is_web_search(tool: dict) -> bool:
    return as_text(tool.get("type")).startswith("web_search_")


@remembered("tools")
def unavailable_tools(request: dict) -> list:
    """Names of the tools that the model will not have; web search is none of them, the exchange answers it."""
    names = {tool["name"] for tool in functions_of(request)} | {PLACEHOLDER}
    return [str(tool.get("name") or tool.get("type")) for tool in request.get("tools") or []
            if tool.get("name") not in names and not is_web_search(tool) and "x-openai" not in tool]


@remembered("tools")
def short_names(request: dict) -> dict:
    """{a tool's name: a shorter one} for names over 64 characters, which only Anthropic takes; some connectors have them."""
    names = [as_text(tool.get("name")) for tool in request.get("tools") or []]
    return {name: flat_name(name) for name in names if len(name) > 64}


def with_names(request: dict, names: dict) -> dict:
    """The request with tools under other names; messages that do not speak of them stay the same objects."""
    return {**request, **{key: [speaking_of(item, names) for item in request[key]] for key in ("tools", "messages")},
            **({"tool_choice": speaking_of(request["tool_choice"], names)} if request.get("tool_choice") else {})}


def speaking_of(item, names: dict):
    """A tool, a message or a block with the names in it replaced; the very object if there are none."""
    if not isinstance(item, dict):
        return item
    changes = {key: names[item[key]] for key in ("name", "tool_name") if isinstance(item.get(key), str) and item[key] in names}
    if isinstance(item.get("content"), list):
        content = mapped(lambda block: speaking_of(block, names), item["content"])
        changes.update({"content": content} if content is not item["content"] else {})
    return {**item, **changes} if changes else item


def with_own_names(events, names: dict):
    """The events with the calls under the names that the client knows."""
    own = {short: name for name, short in names.items()}
    for event in events:
        block = {} if type(event) is Spliced else event.get("content_block") or {}
        name = own.get(block.get("name"))
        yield {**event, "content_block": {**block, "name": name}} if name else event


PLACEHOLDER = "DeferredToolPlaceholder"


def effort_of(request: dict):
    """The effort in force, "low" to "max", or None: thinking is off, or nothing was said.

    The newest role:system message that carries an output_config of its own wins (per-turn control). A budget becomes an effort as
    claude-code-router has it.
    """
    thinking = as_dict(request.get("thinking"))
    if thinking.get("type") == "disabled":
        return None
    for owner in [*reversed(request.get("messages") or []), request]:
        effort = as_text(as_dict(owner.get("output_config")).get("effort"))
        if effort:
            return effort
    if thinking.get("type") != "enabled":
        return None
    budget = thinking.get("budget_tokens")
    return "high" if not isinstance(budget, int) or budget > 8192 else "medium" if budget > 1024 else "low"


def output_format(request: dict) -> dict:
    """The JSON schema format of the answer, {} if none; it has two spellings."""
    wanted = as_dict(as_dict(request.get("output_config")).get("format") or request.get("output_format"))
    return wanted if wanted.get("type") == "json_schema" and isinstance(wanted.get("schema"), dict) else {}


def wants_json(request: dict) -> bool:
    """Whether an OpenAI client wants a JSON object of no given schema, for which Anthropic has no word."""
    return as_dict(as_dict(request.get("x-openai")).get("response_format")).get("type") == "json_object"


def search_blocks(links: dict, query="") -> list:
    """The blocks that tell of a search the model made by itself: {url: title} -> server_tool_use, web_search_tool_result."""
    id = new_id("srvtoolu_")
    results = [{"type": "web_search_result", "url": url, "title": title, "encrypted_content": "", "page_age": None}
               for url, title in links.items()]
    return [{"type": "server_tool_use", "id": id, "name": "web_search", "input": {"query": query} if query else {}},
            {"type": "web_search_tool_result", "tool_use_id": id, "content": results}]


def endpoint_url(url: str, ending: str) -> str:
    """The configured address if it is a whole endpoint; completed if it is a host or ends like a base address."""
    address, query = split_url(url)
    if re.match(r"https?://[^/]+$", address):
        address += "/v1" + ending
    elif re.search(r"/(v\d+\w*|openai|api|inference|compat)$", address):
        address += ending
    return address + query


def split_url(url: str) -> tuple:
    """(address without trailing slashes, "?query" or "")."""
    address, mark, query = url.strip().partition("?")
    return address.rstrip("/"), mark + query


# --- Anthropic Messages

def anthropic_parse_request(body, checked=0) -> dict:
    """The request as it is, its shape checked: renderers may rely on these types. checked: so many messages were before."""
    if as_dict(body).get("thread") is not None:    # the SDKs' tool runners then send the whole history
        raise ApiError(400, "thread: server-side threads are not supported here; send the whole conversation",
                       details={"error_code": "thread_unsupported_request", "unsupported": ["thread"]})
    check_body(body, ANTHROPIC_FIELDS, "stop_sequences")
    check_content(body.get("system") or "", "system")
    for i, message in enumerate(body["messages"][checked:], checked):
        path = "messages.%d" % i
        if expect(message, "an object", path).get("role") not in ("user", "assistant", "system"):
            got = json.dumps(message.get("role"))[:80]
            raise ApiError(400, '%s.role: expected "user", "assistant" or "system", got %s' % (path, got))
        check_content(message.get("content"), path + ".content")
    check_tools(body)
    return without_marks(body)


@remembered("tools")
def check_tools(body: dict) -> None:
    for i, tool in enumerate(body.get("tools") or []):
        expect_fields(expect(tool, "an object", "tools.%d" % i), TOOL_FIELDS, "tools.%d." % i)
        if not tool.get("name") and not tool.get("type"):
            raise ApiError(400, "tools.%d.name: expected a string, got nothing" % i)


def check_body(body, fields: dict, stop: str) -> None:
    """ApiError(400) for what no request may hold, in the words of its format."""
    expect_fields(expect(body, "an object", "the body"), fields)
    if not body["messages"]:
        raise ApiError(400, "messages: at least one message is required")
    check_limits(body)
    for i, text in enumerate(body[stop] if isinstance(body.get(stop), list) else ()):
        expect(text, "a string", "%s.%d" % (stop, i))


def check_limits(body: dict) -> None:
    for name in LIMITS:
        if type(body.get(name)) is int and body[name] < 1:
            raise ApiError(400, "%s: must be at least 1" % name)


LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


def without_marks(value: dict) -> dict:
    """Without the keys that only ccr sets and understands; the very object if there are none."""
    return {key: item for key, item in value.items() if key[:2] != "x-"} if any(key[:2] == "x-" for key in value) else value


ANTHROPIC_FIELDS = {
    "messages": "a list", "model": "a string?", "system": "a string or a list?", "tools": "a list?", "tool_choice": "an object?",
    "thinking": "an object?", "output_config": "an object?", "metadata": "an object?", "max_tokens": "an integer?",
    "temperature": "an integer or a number?", "top_p": "an integer or a number?", "top_k": "an integer?",
    "stop_sequences": "a list?", "stream": "true or false?",
}
TOOL_FIELDS = {"name": "a string?", "type": "a string?", "input_schema": "an object?", "description": "a string?"}
BLOCK_FIELDS = {
    "text": {"text": "a string"},
    "thinking": {"thinking": "a string", "signature": "a string?"},
    "image": {"source": "an object"},
    "document": {"source": "an object", "title": "a string?"},
    "tool_use": {"id": "a string", "name": "a string", "input": "an object?"},
    "tool_result": {"tool_use_id": "a string", "content": "a string or a list?"},
    "server_tool_use": {"id": "a string", "name": "a string", "input": "an object?"},
    "web_search_tool_result": {"tool_use_id": "a string", "content": "a list or an object"},
}


def check_content(content, path: str) -> None:
    if isinstance(content, str):
        return
    for i, block in enumerate(expect(content, "a list", path)):
        here = "%s.%d" % (path, i)
        kind = expect(expect(block, "an object", here).get("type"), "a string", here + ".type")
        expect_fields(block, BLOCK_FIELDS.get(kind, {}), here + ".")
        inner = block.get("content") if kind != "document" else as_dict(block.get("source")).get("content")
        if isinstance(inner, list) and kind in ("tool_result", "search_result", "document"):
            check_content(inner, here + ".content")


def anthropic_render_request(request: dict) -> dict:
    """The request as it is (the same object if nothing stands against it), without what only ccr understands.

    What other models left in the conversation is made acceptable: thinking without a signature and empty texts are left out, ids
    are spelled in Anthropic's alphabet. max_tokens is required there, and mid-conversation system messages of OpenAI clients
    become user text.
    """
    messages = [clean_message(message) for message in request["messages"]]
    if "x-openai" in request or "x-responses" in request:
        messages = without_system_roles(messages)
    changes = {"messages": [message for message in messages if message["content"]]}
    for key in ("system", "tools"):
        if isinstance(request.get(key), list):
            changes[key] = [clean_block(block) for block in request[key] if block.get("type") != "x-openai"]
    if wants_json(request):
        system = changes.get("system", request.get("system"))
        changes["system"] = [*blocks_of({"content": system}), {"type": "text", "text": "Answer with nothing but a JSON object."}]
    if not request.get("max_tokens"):
        changes["max_tokens"] = DEFAULT_MAX_TOKENS
    changes = {key: value for key, value in changes.items() if value != request.get(key)}
    return without_marks({**request, **changes} if changes else request)


DEFAULT_MAX_TOKENS = 32000


def clean_message(message: dict) -> dict:
    content = message.get("content")
    if isinstance(content, list):
        content = [clean_block(block) for block in content if block.get("text") != "" and (
            block.get("type") != "thinking" or is_anthropic_signature(block.get("signature")))]
    return without_marks(message if content == message.get("content") else {**message, "content": content})


def is_anthropic_signature(signature) -> bool:
    """Whether Anthropic may have signed it: it refuses a thought that somebody else did."""
    return isinstance(signature, str) and bool(signature) and not signature.startswith(FOREIGN_SIGNATURES)


UNSIGNED = "ccr:"    # the signature that clients get of a thought without one: some send back only what is signed
FOREIGN_SIGNATURES = ("gemini:", "openai-responses:", "openrouter:", UNSIGNED)


def clean_block(block: dict) -> dict:
    ids = {key: NO_ID.sub("_", block[key]) for key in ("id", "tool_use_id") if NO_ID.search(as_text(block.get(key)))}
    return without_marks({**block, **ids} if ids else block)


NO_ID = Pattern(r"[^A-Za-z0-9_-]")


def anthropic_parse_message(body) -> dict:
    if as_dict(body).get("error"):
        raise error_in(body)
    if not isinstance(as_dict(body).get("content"), list):
        raise ApiError(502, "the provider's reply holds no message: %s" % json.dumps(body)[:200])
    reply = AnthropicReply(BlockWriter(new_id("msg_"), ""))
    events = unfold({**body, "content": checked_blocks(body["content"])})
    return fold(told for event in events for told in reply.read(event))


def sound_message(own: dict, message: dict) -> dict:
    """The provider's message, in which what would break a client is ours."""
    names = {key: as_text(message.get(key)) or own[key] for key in ("id", "model")}
    return {**message, **own, **names, "usage": merge_usage(own["usage"], counts_of(message.get("usage")))}


def checked_blocks(blocks: list) -> list:
    """The blocks of a provider's reply; ApiError(502) for one that would break a client."""
    try:
        check_content(blocks, "content")
    except ApiError as e:
        raise ApiError(502, "the provider's reply is damaged: %s" % e.message)
    if any(block.get("name") == "" for block in blocks):
        raise ApiError(502, "the provider sent a tool call without a name")
    return [{**block, "input": block.get("input") or {}, "id": block.get("id") or new_id("toolu_")} if "tool_use" in block["type"]
            else block for block in blocks]


def counts_of(usage) -> dict:
    """The usage without counts that are no counts."""
    return {key: value for key, value in as_dict(usage).items() if key not in USAGE_COUNTS or type(value) is int and value >= 0}


USAGE_COUNTS = tuple(empty_usage())


def anthropic_parse_stream(frames, writer):
    """The provider's events as they came; what would break the client's strict accumulator is mended or an error.

    message_delta gets the four counts, those that only message_start told among them: some clients read no other.
    """
    reply = AnthropicReply(writer)
    for frame in frames:
        event = as_dict(parse_json(frame, "a frame of the provider's stream"))
        yield from reply.read(event)
        if event.get("type") == "message_stop":
            return
    raise ApiError(502, "the provider's stream ended too early: no message_stop came")


class AnthropicReply:
    """The events of a provider's stream, numbered anew. place: (its own number of the open block,), None if none is open."""

    def __init__(self, writer):
        self.message, self.number, self.place, self.block = writer.message, -1, None, {}
        self.stop_reason, self.is_started = None, False

    def read(self, event) -> list:
        kind = as_text(event.get("type"))
        if kind == "error" or event.get("error"):
            raise error_in(event)
        if kind in self.READERS:
            return self.READERS[kind](self, event)
        if "index" in event or not EVENT_NAME.fullmatch(kind):
            raise ApiError(502, "the provider sent an event of an unknown type: %s" % kind)
        return [event] if self.is_started else []

    def start(self, event) -> list:
        if self.is_started:
            return []
        self.is_started = True
        self.message = sound_message(self.message, as_dict(event.get("message")))
        return [{**event, "type": "message_start", "message": self.message}]

    def open_block(self, event) -> list:
        events = self.start({}) + self.close()
        self.block, = checked_blocks([event.get("content_block")])
        self.number, self.place = self.number + 1, (event.get("index"),)
        first, deltas = unfold_block(self.block)
        return events + [{**event, "index": self.number, "content_block": first}] + [
            {"type": "content_block_delta", "index": self.number, "delta": delta} for delta in deltas]

    def tell_delta(self, event) -> list:
        if self.place != (event.get("index"),):
            raise ApiError(502, "the provider sent a delta for block %s, which is not open" % event.get("index"))
        check_delta(as_dict(event.get("delta")), self.block["type"])
        return [{**event, "index": self.number}]

    def close(self, event=None) -> list:
        """Ends the open block; event: the provider's own end of a block."""
        if self.place is None or event and self.place != (event.get("index"),):
            return []
        self.place = None
        return [{**(event or {"type": "content_block_stop"}), "index": self.number}]

    def tell_end(self, event) -> list:
        delta = as_dict(event.get("delta"))
        untold = "tool_use" if self.block.get("type") == "tool_use" else "end_turn"
        self.stop_reason = as_text(delta.get("stop_reason")) or self.stop_reason or untold
        delta = {**delta, "stop_reason": self.stop_reason, "stop_sequence": as_text(delta.get("stop_sequence")) or None}
        usage = merge_usage(self.message["usage"], counts_of(event.get("usage")))
        return self.start({}) + self.close() + [{**event, "delta": delta, "usage": usage}]

    def stop(self, event) -> list:
        return (self.close() if self.stop_reason else self.tell_end({"type": "message_delta"})) + [event]

    READERS = {"content_block_delta": tell_delta, "content_block_start": open_block, "content_block_stop": close,
               "message_start": start, "message_delta": tell_end, "message_stop": stop}


def check_delta(delta: dict, block_type: str) -> None:
    """ApiError(502) for a delta that does not say what its type promises, or does not belong into this block."""
    kind = as_text(delta.get("type"))
    home, member = DELTA_HOMES.get(kind, (block_type, None))
    if not member and (block_type in BLOCK_FIELDS or not kind.endswith("_delta")):
        raise ApiError(502, "the provider sent a delta of an unknown type: %s" % kind)
    if member and not isinstance(delta.get(member), dict if member == "citation" else str):
        raise ApiError(502, "the provider sent a %s without its %s" % (kind, member))
    if home != block_type if home else block_type in ("text", "thinking"):
        raise ApiError(502, "the provider sent a %s for a %s block" % (kind, block_type))


DELTA_HOMES = {    # type of delta -> (the type of block it belongs to, None: a call of any kind; its member)
    "text_delta": ("text", "text"), "citations_delta": ("text", "citation"), "thinking_delta": ("thinking", "thinking"),
    "signature_delta": ("thinking", "signature"), "input_json_delta": (None, "partial_json"),
}
EVENT_NAME = Pattern("(?!content_block|message)[a-z][a-z_.]{0,60}")


def anthropic_render_message(message, request) -> dict:
    return {**message, "content": [{**block, "signature": UNSIGNED} if is_unsigned(block) else block
                                   for block in message["content"]]}


def is_unsigned(block: dict) -> bool:
    return block.get("type") == "thinking" and not block.get("signature")


def anthropic_render_stream(events, request):
    lacks_signature = False    # of the open block
    for event in events:
        if type(event) is Spliced:
            yield event.data
            continue
        kind = event["type"]
        if kind == "content_block_start":
            lacks_signature = is_unsigned(event["content_block"])
        elif lacks_signature and kind == "content_block_delta":
            lacks_signature = event["delta"].get("type") != "signature_delta"
        elif lacks_signature and kind == "content_block_stop":
            delta = {"type": "signature_delta", "signature": UNSIGNED}
            yield encode_event({"type": "content_block_delta", "index": event["index"], "delta": delta})
        yield encode_event(event)


def anthropic_endpoint(url, model, stream) -> str:
    address, query = split_url(url)
    if not address.endswith("/messages"):
        address += "/messages" if address.endswith("/v1") else "/v1/messages"
    return address + query


def anthropic_auth(key) -> dict:
    """x-api-key and nothing beside it: some providers refuse two; a key written as "Bearer ..." is a token."""
    if key and key.startswith("Bearer "):
        return {"Authorization": key}
    return {"x-api-key": key} if key else {}


ANTHROPIC = Format("anthropic", anthropic_parse_request, anthropic_render_request, anthropic_parse_message,
                   anthropic_render_message, anthropic_parse_stream, anthropic_render_stream, anthropic_endpoint, anthropic_auth,
                   render_error=error_body, stream_error=lambda error: encode_event(error_body(error)),
                   ping=encode_event({"type": "ping"}))


# --- OpenAI chat completions

# A pivot request carries under "x-openai" what only this format knows: of the body (seed, logprobs, n, response_format ...), of a
# message (name, role developer ...), of a block (the part as it was). Going back to this format it is put in again unchanged.
#
# "x-cache": True in a pivot request keeps Anthropic's cache markers on text parts, for OpenRouter's claude models; "x-files":
# True sends base64 documents as `file` parts, "x-details": True a Gemini's signatures as OpenRouter has them, for hosts that take
# them. All three are for transformers to set.

def openai_render_request(request: dict) -> dict:
    """The chat completions body. Fields that only Anthropic knows never travel, and none is sent empty."""
    extra = as_dict(request.get("x-openai"))
    messages = request["messages"]
    lead = leading_systems(messages)
    body = {"model": request.get("model"),
            "messages": openai_system(request, messages[:lead]) + openai_messages(messages[lead:], request)}
    for name in ("max_tokens", "temperature", "top_p", "stop"):
        if request.get(PIVOT_NAMES[name]) not in (None, []):
            body[name] = request[PIVOT_NAMES[name]]
    body.update(openai_tools(request))
    effort, schema = effort_of(request), output_format(request)
    if effort:
        body["reasoning_effort"] = COMMON_EFFORTS.get(effort, effort)
    if schema:
        body["response_format"] = openai_response_format(schema)
    if request.get("stream"):
        body["stream"] = True
        body["stream_options"] = {**as_dict(extra.get("stream_options")), "include_usage": True}
    return {**body, **{key: value for key, value in extra.items() if key != "stream_options"}}


COMMON_EFFORTS = {"xhigh": "high", "max": "high"}    # where the scale of most providers ends


def leading_systems(messages: list) -> int:
    """How many messages stand before the first of the user or the model: all of role system."""
    return next((n for n, message in enumerate(messages) if message["role"] != "system"), len(messages))


def openai_system(request: dict, lead=()) -> list:
    """The leading system message: all of it in one, since many templates allow no second; a developer's stays one of its own."""
    blocks = system_blocks(request) + [{"type": "text", "text": text_of(message.get("content"))} for message in lead]
    plain = [openai_part(block, request) for block in blocks if "x-openai" not in block]
    return [{"role": "system", "content": openai_joined(plain, "\n\n")}] * bool(plain) + [
        {"role": "system", "content": block["text"], **as_dict(block["x-openai"])} for block in blocks if "x-openai" in block]


def openai_messages(messages: list, request: dict) -> list:
    """The conversation; of the rest of the request only the x- switches matter to it."""
    return [message for own in settled(messages) for message in OPENAI_ROLES[own["role"]](own, request)]


def openai_user(message: dict, request: dict):
    """Tool messages first, then one user message: the images of the results, then the user's own parts."""
    parts, images = [], []
    for block in blocks_of(message):
        if block.get("type") == "tool_result":
            text, more = result_parts(block)
            images += more
            content = openai_content([openai_text(text, block, request)])
            yield {"role": "tool", "tool_call_id": block["tool_use_id"], "content": content}
        else:
            parts.append(openai_part(block, request))
    parts = [openai_part(image, request) for image in images] + [part for part in parts if part.get("text") != ""]
    if parts or message.get("content") == "":
        yield {"role": "user", "content": openai_content(parts), **as_dict(message.get("x-openai"))}


def openai_assistant(message: dict, request: dict):
    """One assistant message.

    Thinking goes along as reasoning_content wherever there is some: DeepSeek, Kimi, MiniMax and GLM refuse or forget without it
    in a tool loop, models served by a template drop what theirs does not want, and a rule that looked at later turns would
    change what the provider has cached.
    """
    thinking, texts, calls, details = [], [], [], []
    for block in blocks_of(message):
        kind = block.get("type")
        if kind == "thinking":
            thinking.append(block.get("thinking") or "")
            details += kept_details(block) if request.get("x-details") else []
        elif kind == "tool_use":
            calls.append(openai_call(block))
        else:
            texts.append(openai_text(block_text(block), block, request))
    texts, reasoning = [part for part in texts if part["text"]], "\n".join(filter(None, thinking))
    content = openai_joined(texts, "\n") or (None if calls else "")
    more = {"reasoning_content": reasoning, "reasoning_details": details, "tool_calls": calls, **as_dict(message.get("x-openai"))}
    more = {key: value for key, value in more.items() if value}
    if content or more:
        yield {"role": "assistant", "content": content, **more}


def kept_details(block: dict) -> list:
    """What OpenRouter must get back of a Gemini's reply; it stands in the signature as it came."""
    signature = as_text(block.get("signature"))
    return dicts_in([json_or_text(signature[len(OPENROUTER_SIGNATURE):])]) if signature.startswith(OPENROUTER_SIGNATURE) else []


OPENROUTER_SIGNATURE = "openrouter:"


def openai_mid_system(message: dict, request: dict):
    text = text_of(message.get("content"))
    if text:
        yield {"role": "system", "content": text, **as_dict(message.get("x-openai"))}


OPENAI_ROLES = {"user": openai_user, "assistant": openai_assistant, "system": openai_mid_system}


def openai_joined(texts: list, between: str):
    """Text parts as one string; as they are if there is a cache marker among them."""
    return texts if any("cache_control" in part for part in texts) else between.join(part["text"] for part in texts)


def openai_content(parts: list):
    """One plain text as a string, which every server understands; else the parts."""
    if len(parts) == 1 and set(parts[0]) == {"type", "text"}:
        return parts[0]["text"]
    return parts or ""


def openai_part(block: dict, request: dict) -> dict:
    kind, url = block.get("type"), image_url(block)
    if as_dict(block.get("x-openai")).get("type"):
        return block["x-openai"]
    if kind == "image" and url:
        return {"type": "image_url", "image_url": {"url": url}}
    if kind == "document" and request.get("x-files") and as_text(url).startswith("data:"):
        return {"type": "file", "file": {"filename": block.get("title") or "document", "file_data": url}}
    return openai_text(block_text(block), block, request)


def openai_text(text, block, request) -> dict:
    is_marked = request.get("x-cache") and block.get("cache_control")
    return {"type": "text", "text": text, **({"cache_control": block["cache_control"]} if is_marked else {})}


def openai_call(block: dict) -> dict:
    """The arguments are written as models do, with spaces and without escapes: a server's cache of the prompt fits more often."""
    value = block.get("input") or {}
    arguments = value[RAW_ARGUMENTS] if value.keys() == {RAW_ARGUMENTS} else json.dumps(value, ensure_ascii=False)
    return {"id": block["id"], "type": "function", "function": {"name": block["name"], "arguments": arguments}}


RAW_ARGUMENTS = "x-raw-arguments"    # the one member of an input that was no JSON object


def openai_tools(request: dict) -> dict:
    """The members tools, tool_choice and parallel_tool_calls; without a tool none of them may be sent."""
    tools = openai_functions(request)
    if not tools:
        return {}
    choice, names = as_dict(request.get("tool_choice")), [as_dict(tool.get("function")).get("name") for tool in tools]
    body, wanted = {"tools": tools}, TOOL_CHOICES.get(as_text(choice.get("type")))
    if choice.get("type") == "tool" and choice.get("name") in names:    # a choice of a tool that was left out goes with it
        wanted = {"type": "function", "function": {"name": choice["name"]}}
    if wanted:
        body["tool_choice"] = wanted
    if choice.get("disable_parallel_tool_use"):
        body["parallel_tool_calls"] = False
    return body


TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
PIVOT_CHOICES = {theirs: own for own, theirs in TOOL_CHOICES.items()}


@remembered("tools")
def openai_functions(request: dict) -> list:
    own = [tool["x-openai"] for tool in request.get("tools") or [] if as_dict(tool.get("x-openai"))]
    return [openai_tool(tool) for tool in functions_of(request)] + own


def openai_tool(tool: dict) -> dict:
    schema = tool["input_schema"]
    if schema.get("type") == "object" and "properties" not in schema:    # OpenAI refuses an object without
        schema = {**schema, "properties": {}}
    function = {"name": tool["name"], "description": tool.get("description"), "parameters": schema, "strict": tool.get("strict")}
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


def openai_response_format(wanted: dict) -> dict:
    """strict only where OpenAI would accept it, which is choosier than Anthropic."""
    schema = wanted["schema"]
    try:
        strict = is_strict(schema)
    except (TypeError, RecursionError):    # no schema that anybody could read
        strict = False
    return {"type": "json_schema", "json_schema": {"name": wanted.get("name") or "answer", "schema": schema, "strict": strict}}


def is_strict(schema) -> bool:
    """Whether every object in the schema is closed and requires all its properties."""
    if not isinstance(schema, dict):
        return not isinstance(schema, list) or all(map(is_strict, schema))
    properties = schema.get("properties")
    if isinstance(properties, dict):
        if schema.get("additionalProperties") is not False or set(schema.get("required") or ()) != set(properties):
            return False
    return all(map(is_strict, schema.values()))


# the same from the client's side

def openai_parse_request(body) -> dict:
    """The pivot request of a chat completions body; what the pivot has no word for goes to "x-openai"."""
    check_body(body, OPENAI_FIELDS, "stop")
    if body.get("functions"):    # OpenAI's own clients stopped sending them in 2023
        raise ApiError(400, "functions: not supported here; send them as tools")
    request = {own: body[name] for name, own in PIVOT_NAMES.items() if body.get(name) is not None}
    if isinstance(body.get("stop"), str):
        request["stop_sequences"] = [body["stop"]]
    request["system"], request["messages"] = openai_parse_messages(body["messages"])
    request.update(tools=openai_parse_tools(body), tool_choice=openai_parse_choice(body))
    effort, wanted = body.get("reasoning_effort"), as_dict(as_dict(body.get("response_format")).get("json_schema"))
    config = {"effort": {"minimal": "low"}.get(effort, effort) if effort != "none" else None,
              "format": {"type": "json_schema", "schema": wanted["schema"]} if isinstance(wanted.get("schema"), dict) else None}
    request["output_config"] = {key: value for key, value in config.items() if value} or None
    request["thinking"] = effort and {"type": "disabled" if effort == "none" else "adaptive"}
    request = {key: value for key, value in request.items() if value not in (None, [], "")}
    rendered = openai_render_request({**request, "messages": []})
    request["x-openai"] = {key: value for key, value in body.items() if key not in OPENAI_KNOWN and value is not None
                           and (value != rendered.get(key) or key == "stream_options")}
    return request


OPENAI_FIELDS = {
    "messages": "a list", "model": "a string?", "tools": "a list?", "tool_choice": "a string or an object?",
    "parallel_tool_calls": "true or false?", "max_tokens": "an integer?", "max_completion_tokens": "an integer?",
    "temperature": "an integer or a number?", "top_p": "an integer or a number?", "stop": "a string or a list?",
    "stream": "true or false?", "stream_options": "an object?", "response_format": "an object?", "reasoning_effort": "a string?",
    "n": "an integer?", "functions": "a list?",
}
PIVOT_NAMES = {"model": "model", "max_tokens": "max_tokens", "max_completion_tokens": "max_tokens", "temperature": "temperature",
               "top_p": "top_p", "stop": "stop_sequences", "stream": "stream"}
OPENAI_KNOWN = ("messages", "tools", *PIVOT_NAMES)


def openai_parse_messages(messages: list) -> tuple:
    """(system, messages) of the pivot: what leads as system or developer is the system, tool messages and the user's after them
    are one message."""
    system, out, is_open = [], [], False    # is_open: results came last, and more of them or the user's words join them
    for i, message in enumerate(messages):
        path = "messages.%d" % i
        role = as_text(expect(message, "an object", path).get("role"))
        if role not in OPENAI_PARSERS:
            got = json.dumps(message.get("role"))[:80]
            raise ApiError(400, "%s.role: expected one of %s, got %s" % (path, ", ".join(OPENAI_PARSERS), got))
        own = OPENAI_PARSERS[role](message, path)
        extra = {key: value for key, value in message.items() if key not in OPENAI_MESSAGE_FIELDS and value is not None}
        if role == "developer":
            extra["role"] = role
        if role in ("system", "developer") and not out:
            system += [{"type": "text", "text": text_of(own), "x-openai": extra}] if extra else blocks_of({"content": own})
        elif is_open and (role == "tool" or role == "user" and not extra):
            out[-1]["content"] += blocks_of({"content": own})
        else:
            more = {"x-openai": extra} if extra and role != "tool" else {}
            out.append({"role": {"tool": "user", "developer": "system"}.get(role, role), "content": own, **more})
        is_open = role == "tool"
    is_plain = len(system) == 1 and system[0].keys() == {"type", "text"}
    return system[0]["text"] if is_plain else system, out


OPENAI_MESSAGE_FIELDS = ("role", "content", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "annotations",
                         "parsed")


def openai_own_message(message: dict) -> dict:
    """A message that goes on as it came, without what the SDKs add to their copy of a reply: strict providers refuse it."""
    if message.get("role") != "assistant":
        return message
    for path in ("annotations", "parsed", "tool_calls.index", "tool_calls.function.parsed_arguments"):
        message = dropped(message, path.split("."))
    return {key: value for key, value in message.items() if key == "content" or value is not None}


def openai_parse_content(message, path):
    """A string, or blocks; a part that Anthropic has no block for keeps its form for OpenAI and is words for everybody else."""
    content = expect(message.get("content"), "a string or a list?", path + ".content")
    if not isinstance(content, list):
        return content or ""
    return [openai_parse_part(part, "%s.content.%d" % (path, n)) for n, part in enumerate(content)]


def openai_parse_part(part, path) -> dict:
    kind = expect(part, "an object", path).get("type")
    if kind in ("text", "input_text", "output_text", "refusal"):
        text = expect(part.get("text", part.get("refusal")), "a string", path + ".text")
        return {"type": "text", "text": text, **({"cache_control": part["cache_control"]} if part.get("cache_control") else {})}
    if kind == "image_url":
        image = part.get("image_url")
        url = expect(image.get("url") if isinstance(image, dict) else image, "a string", path + ".image_url.url")
        block = {"type": "image", "source": media_source(url)}
        return {**block, "x-openai": part} if openai_part(block, {}) != part else block
    file = as_dict(part.get("file"))
    if kind == "file" and as_text(file.get("file_data")).startswith("data:"):
        title = {"title": file["filename"]} if as_text(file.get("filename")) else {}
        return {"type": "document", "source": media_source(file["file_data"]), **title, "x-openai": part}
    words = "[%s: this model cannot be given it]" % expect(kind, "a string", path + ".type")
    return {"type": "text", "text": words, "x-openai": part}


def openai_parse_assistant(message, path):
    thinking = as_text(message.get("reasoning_content") or message.get("reasoning"))
    content = openai_parse_content(message, path)
    calls = expect(message.get("tool_calls"), "a list?", path + ".tool_calls")
    if not calls and not thinking:
        return content
    blocks = [{"type": "thinking", "thinking": thinking, "signature": ""}] if thinking else []
    blocks += blocks_of({"content": content})
    return blocks + [openai_parse_call(call, "%s.tool_calls.%d" % (path, n)) for n, call in enumerate(calls or [])]


def openai_parse_call(call, path) -> dict:
    function = expect(expect(call, "an object", path).get("function"), "an object", path + ".function")
    expect_fields(function, {"name": "a string"}, path + ".function.")
    return {"type": "tool_use", "id": expect(call.get("id"), "a string", path + ".id"), "name": function["name"],
            "input": call_input(function.get("arguments"), path + ".function.arguments")}


def call_input(arguments, path) -> dict:
    """The arguments of a call in the history; a model's broken JSON travels as it is."""
    value = json_or_text(expect(arguments, "a string or an object?", path) or "{}")
    return value if isinstance(value, dict) else {RAW_ARGUMENTS: arguments}


def openai_parse_result(message, path) -> list:
    id = expect(message.get("tool_call_id"), "a string", path + ".tool_call_id")
    return [parsed_result(id, openai_parse_content(message, path))]


OPENAI_PARSERS = {"system": openai_parse_content, "developer": openai_parse_content, "user": openai_parse_content,
                  "assistant": openai_parse_assistant, "tool": openai_parse_result}


def openai_parse_tools(body) -> list:
    tools = []
    for i, tool in enumerate(body.get("tools") or []):
        path = "tools.%d" % i
        kind = expect(tool, "an object", path).get("type", "function")
        if kind == "custom":    # its calls carry free text, which no other format knows
            raise ApiError(400, "%s.type: custom tools are not supported here; use a function with one string parameter" % path)
        if kind != "function":
            tools.append({"type": "x-openai", "name": expect(kind, "a string", path + ".type"), "x-openai": tool})
            continue
        function = expect(tool.get("function"), "an object", path + ".function")
        expect_fields(function, FUNCTION_FIELDS, path + ".function.")
        own = {"name": function["name"], "description": function.get("description"), "strict": function.get("strict"),
               "input_schema": function.get("parameters") or {"type": "object", "properties": {}}}
        tools.append({key: value for key, value in own.items() if value is not None})
    return tools


FUNCTION_FIELDS = {"name": "a string", "description": "a string?", "parameters": "an object?", "strict": "true or false?"}


def openai_parse_choice(body):
    """tool_choice and parallel_tool_calls as one; a form that only OpenAI knows counts as auto and travels in x-openai."""
    choice, own = body.get("tool_choice"), None
    if isinstance(choice, dict):
        is_named = choice.get("type") == "function"
        own = {"type": "tool", "name": as_dict(choice.get("function")).get("name")} if is_named else {"type": "auto"}
    elif choice in PIVOT_CHOICES:
        own = {"type": PIVOT_CHOICES[choice]}
    elif choice is not None:
        raise ApiError(400, 'tool_choice: expected "auto", "none", "required" or an object, got %s' % json.dumps(choice)[:80])
    if body.get("parallel_tool_calls") is False and body.get("tools"):
        own = {**(own or {"type": "auto"}), "disable_parallel_tool_use": True}
    return own


# replies of providers

def openai_parse_message(body) -> dict:
    if isinstance(body, dict) and not dicts_in(body.get("choices")):
        nothing = ApiError(502, "the provider's reply holds no choices: %s" % json.dumps(body)[:200])
        raise nothing if body.keys().isdisjoint(ERROR_KEYS) else error_in(body)
    reply = ChatReply(BlockWriter(new_id("msg_"), as_text(as_dict(body).get("model"))))
    return fold(reply.read(body) + reply.end())


def openai_parse_stream(frames, writer):
    reply = ChatReply(writer)
    for frame in frames:
        if type(frame) is Spliced:
            writer.note(frame)
            yield frame
        elif frame.strip() == b"[DONE]":    # after it nothing is read
            reply.is_done = True
            break
        else:
            yield from reply.read(parse_json(frame, "a frame of the provider's stream"))
    yield from reply.end()


class ChatReply:
    """What a provider said, from its chunks or from one whole chat.completion, to a BlockWriter."""

    def __init__(self, writer):
        self.writer, self.tags, self.calls = writer, TagReader("think", at_start=True), CallBook(writer)
        self.usage, self.links, self.blank = {}, {}, ""
        self.finish, self.is_done, self.has_deltas = None, False, False

    def read(self, chunk) -> list:
        if not isinstance(chunk, dict) or chunk.get("error"):
            raise error_in(chunk)
        if "choices" not in chunk and not chunk.keys().isdisjoint(ERROR_KEYS):    # vLLM, FastAPI
            raise error_in(chunk)
        events, choices = [], chunk.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict) and not choice.get("index"):    # of several answers (n) the first; relays give them all
                events += self._choice(choice)
        if not SELDOM.isdisjoint(chunk):
            self._count(chunk.get("usage") or as_dict(chunk.get("x_groq")).get("usage"))
            self._link(chunk)
        return events

    def _choice(self, choice) -> list:
        if choice.get("error"):
            raise error_in(choice)
        delta = choice.get("delta")
        if not delta and not self.has_deltas and isinstance(choice.get("message"), dict):    # MiniMax repeats it after its deltas
            delta, self.finish = choice["message"], self.finish or "stop"
        told = {key: value for key, value in as_dict(delta).items() if value}    # null and empty fields say nothing
        self.has_deltas = self.has_deltas or bool(told)
        events = []
        if not THOUGHTS.isdisjoint(told):
            events += self._think(told)
        if "content" in told or "refusal" in told:
            events += self._say(told)
        if "tool_calls" in told:
            events += self._call(told)
        if not SELDOM.isdisjoint(told):
            self._link(told)
        if choice.get("finish_reason"):
            self._finish(choice)
        if choice.get("usage"):    # Moonshot
            self._count(choice["usage"])
        return events

    def _think(self, delta) -> list:
        """The thought of a delta, once, under whichever of its names it comes, and its signature."""
        details = dicts_in(delta.get("reasoning_details"))
        names = ("reasoning_content", "reasoning", "reasoning_text")
        thoughts = [delta[name] for name in names if isinstance(delta.get(name), str)][:1]
        thoughts = thoughts or [as_text(detail.get("text") or detail.get("summary")) for detail in details]
        events = self.writer.thinking("".join(thoughts))
        for detail in details:
            events += self.writer.signature(as_text(detail.get("signature")))
            if as_text(detail.get("data")) and "gemini" in as_text(detail.get("format")):
                events += self.writer.signature(OPENROUTER_SIGNATURE + dump_json(detail).decode())
        return events

    def _say(self, delta) -> list:
        """Its text: a string, or parts (Mistral puts thinking there), and the model's refusal."""
        content = delta.get("content")
        if isinstance(content, str) and not self.tags.awaited and self._is_in_text() and len(delta) == 1:
            return self.writer.text(content)
        events = self._pieces(self.tags(content)) if isinstance(content, str) else []
        for part in dicts_in(content):
            if isinstance(part.get("thinking"), (str, list)):
                events += self.writer.thinking(text_of(part["thinking"]))
            else:
                events += self._pieces(self.tags(as_text(part.get("text"))))
        return events + self._pieces([("text", as_text(delta.get("refusal")))])

    def _call(self, delta) -> list:
        events, calls = self._pieces(self.tags(None)) if self.tags.rest else [], delta["tool_calls"]
        calls = dicts_in([calls] if isinstance(calls, dict) else calls)
        for position, call in enumerate(calls):
            events += self.calls.tell(call, position if len(calls) > 1 else None)
        return events

    def _pieces(self, pieces) -> list:
        """White space alone opens no block: it waits for the text that it belongs to."""
        events = []
        for kind, text in pieces:
            if kind == "thinking":
                events, self.blank = events + self.writer.thinking(text), ""
            elif not text or text.isspace() and not self._is_in_text():
                self.blank += text
            else:
                events += self.writer.text(self.blank + text)
                self.blank = ""
        return events

    def _is_in_text(self) -> bool:
        block = self.writer.waiting[-1] if self.writer.waiting else self.writer.current
        return block is not None and block.kind == "text"

    def _finish(self, choice) -> None:
        finish = choice["finish_reason"]
        if not isinstance(finish, str):
            raise error_in({"error": finish})
        if finish.lower() in BROKEN_OFF:
            raise ApiError(502, "the provider broke off its answer: finish_reason %s" % finish)
        if self.finish is None or "message" in choice:
            self.finish = finish.lower()

    def _count(self, usage) -> None:
        self.usage = merge_usage(self.usage, as_dict(usage))

    def _link(self, holder) -> None:
        """Takes note of what a model that searches by itself cites, as OpenAI, OpenRouter, Perplexity and Groq say it."""
        found = [as_dict(item.get("url_citation")) for item in dicts_in(holder.get("annotations"))]
        found += dicts_in(holder.get("search_results"))
        for tool in dicts_in(holder.get("executed_tools")):
            found += dicts_in(as_dict(tool.get("search_results")).get("results"))
        for item in found:
            if as_text(item.get("url")):
                self.links.setdefault(item["url"], as_text(item.get("title")) or item["url"])

    def end(self) -> list:
        events = self._pieces(self.tags(None))
        if self.finish is None and not (self.is_done and self.writer.has_content):
            raise ApiError(502, "the provider's stream ended too early: %s" %
                           ("it said nothing" if self.is_done else "neither finish_reason nor [DONE] came"))
        for block in search_blocks(self.links) if self.links else ():
            events += self.writer.block(block)
        return events + self.writer.finish(STOP_REASONS.get(self.finish), usage_of_openai(self.usage))


STOP_REASONS = {    # finish_reason, lower-case -> stop_reason; what is not here ends the turn, or is tool_use if a call was made
    "stop": "end_turn",
    "length": "max_tokens", "max_tokens": "max_tokens", "model_length": "max_tokens",
    "tool_calls": "tool_use",
    "content_filter": "refusal", "sensitive": "refusal", "safety": "refusal",
}
SELDOM = frozenset(("usage", "x_groq", "annotations", "search_results", "executed_tools"))
THOUGHTS = frozenset(("reasoning_content", "reasoning", "reasoning_text", "reasoning_details"))
BROKEN_OFF = ("error", "abort", "network_error", "insufficient_system_resource")


class TagReader:
    """Tells what a model writes between <think> and </think> from the rest, in whatever pieces it comes: [("thinking" or "text",
    str)] for each; None is the end. The white space after a tag belongs to it.

    at_start: only a tag that the text begins with counts, and only once.
    """

    def __init__(self, tag: str, at_start=False):
        self.begin, self.finish, self.at_start = "<%s>" % tag, "</%s>" % tag, at_start
        self.awaited, self.rest, self.trims = self.begin, "", False

    def __call__(self, piece) -> list:
        text, parts = self.rest + (piece or ""), []
        if self.at_start and self.awaited == self.begin and not self.begin.startswith(text.lstrip()[:len(self.begin)]):
            self.awaited = None
        while self.awaited and self.awaited in text:
            before, tag, text = text.partition(self.awaited)
            parts.append(self._part(before))
            self.awaited = self.finish if tag == self.begin else None if self.at_start else self.begin
            self.trims = True
        keep = 0
        if self.awaited and piece is not None:    # what may become the tag waits
            keep = next((n for n in range(len(self.awaited) - 1, 0, -1) if text.endswith(self.awaited[:n])), 0)
        self.rest = text[len(text) - keep:]
        return [*parts, self._part(text[:len(text) - keep])]

    def _part(self, text) -> tuple:
        if self.trims:
            text = text.lstrip()
            self.trims = not text
        return "thinking" if self.awaited == self.finish else "text", text


class OpenCall:
    """A call of a reply as its fragments name it; is_renamed: its name came once more after its arguments were whole."""
    id = name = ""
    is_renamed = False


class CallBook:
    """Which call a fragment belongs to, when index and id are missing, repeated, made up or late."""

    def __init__(self, writer):
        self.writer, self.by_index, self.by_id, self.last = writer, {}, {}, None

    def tell(self, fragment: dict, position) -> list:
        function = as_dict(fragment.get("function"))
        id, name, args = as_text(fragment.get("id")), as_text(function.get("name")), function.get("arguments")
        args = "" if args is None else args if isinstance(args, str) else json.dumps(args)
        index = fragment.get("index") if type(fragment.get("index")) is int else None
        if index is None and not id:
            index = position
        call = self.by_index.get(index) if index is not None else self.last
        known = self.by_id.get(id) if id else None
        if known and (call is None or call.id != id) and (index is None or index in self.by_index or not name):
            call = known
        if call is None or (id or name or args.lstrip()[:1] == "{") and self._is_another(call, id, name, args):
            name = name or (call.name if call and call.is_renamed else "")
            call = OpenCall()
        elif name and call.name and not args and self._is_whole(call):
            call.is_renamed = True
        call.id, call.name, self.last = call.id or id, call.name or name, call
        if id:
            self.by_id[id] = call
        if index is not None:
            self.by_index[index] = call
        # hosts that number the calls of each reply from 0 would repeat their ids in the next turn
        return self.writer.tool(call, None if id.isdigit() else id or None, name or None, args)

    def _is_another(self, call, id, name, args) -> bool:
        """Whether the fragment begins another call. A new id without a name may be made up for each delta."""
        if id and call.id and call.id != id and (name or self._is_whole(call)):
            return True
        if name and call.name and name != call.name and (not id or self._is_whole(call)):
            return True
        return args.lstrip()[:1] == "{" and bool(name or call.is_renamed) and self._is_whole(call)

    def _is_whole(self, call) -> bool:
        return self.writer.calls[call].is_done()


def usage_of_openai(usage: dict) -> dict:
    """Anthropic's counts; those that nobody told are left out.

    {"prompt_tokens": 10, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}
    -> {"input_tokens": 6, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 4, "output_tokens": 3}

    OpenAI counts cached tokens within prompt_tokens, Anthropic beside input_tokens. DeepSeek and Moonshot have names of their
    own.
    """
    prompt, details = usage.get("prompt_tokens"), as_dict(usage.get("prompt_tokens_details"))
    cached = first_count(details.get("cached_tokens"), usage.get("prompt_cache_hit_tokens"), usage.get("cached_tokens"),
                         usage.get("cache_read_input_tokens"))
    written = first_count(details.get("cache_write_tokens"), usage.get("cache_creation_input_tokens"))
    told = {"output_tokens": usage.get("completion_tokens")}
    if is_count(prompt):
        told.update(input_tokens=max(0, prompt - cached - written), cache_creation_input_tokens=written,
                    cache_read_input_tokens=cached)
    return counts_of(told)


def is_count(value) -> bool:
    return type(value) is int and value >= 0


def first_count(*values) -> int:
    return next((value for value in values if is_count(value) and value), 0)


def openai_plain_delta(chunk):
    """(kind, text) of a chunk with one delta and nothing else to be read, else None."""
    told = {path: value for path, value in leaves(chunk, "") if path not in PLAIN_NOISE}
    answer, index = told.pop(".choices.0.index", 0), told.pop(".choices.0.delta.tool_calls.0.index", None)
    path, text = told.popitem() if len(told) == 1 else ("", None)
    kind = PLAIN_KINDS.get(path)
    is_sound = type(index) is int if kind == "tool" else index is None
    if not kind or answer or not is_sound or not isinstance(text, str):
        return None
    return ("tool", index) if kind == "tool" else kind, text


def leaves(value, path: str):
    """(path, value) of all that a JSON value says; null and "" say nothing."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(item, (dict, list)):
            yield from leaves(item, "%s.%s" % (path, key))
        elif item not in (None, ""):
            yield "%s.%s" % (path, key), item


PLAIN_NOISE = {".id", ".object", ".created", ".model", ".system_fingerprint", ".service_tier", ".provider", ".obfuscation",
               ".choices.0.delta.role", ".choices.0.delta.tool_calls.0.type"}
PLAIN_KINDS = {".choices.0.delta.content": "text", ".choices.0.delta.reasoning_content": "thinking",
               ".choices.0.delta.reasoning": "thinking", ".choices.0.delta.tool_calls.0.function.arguments": "tool"}


# replies to clients

FINISH_REASONS = {    # stop_reason -> finish_reason; what is not here is "stop"
    "max_tokens": "length", "model_context_window_exceeded": "length", "tool_use": "tool_calls", "refusal": "content_filter",
}


def openai_usage(usage: dict) -> dict:
    cached, written = usage.get("cache_read_input_tokens") or 0, usage.get("cache_creation_input_tokens") or 0
    prompt, completion = (usage.get("input_tokens") or 0) + cached + written, usage.get("output_tokens") or 0
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached}}


def openai_head(message: dict, kind: str, request: dict) -> dict:
    """The members that every chunk repeats. The time of the request is the exchange's to tell, under "x-created"."""
    return {"id": "chatcmpl-" + as_text(message.get("id")).replace("msg_", ""), "object": kind,
            "created": request.get("x-created", 0), "model": message.get("model")}


def openai_citations(block: dict) -> list:
    place = {"start_index": 0, "end_index": 0}
    return [{"type": "url_citation", "url_citation": {"url": item.get("url"), "title": item.get("title"), **place}}
            for item in dicts_in(block.get("content"))]


def openai_render_message(message, request) -> dict:
    said = {"content": "", "reasoning_content": "", "annotations": [], "tool_calls": []}
    for block in message.get("content") or []:
        kind = block.get("type")
        if kind in OPENAI_MEMBERS:
            said[OPENAI_MEMBERS[kind]] += block.get(kind) or ""
        elif kind == "tool_use":
            said["tool_calls"].append(openai_call(block))
        elif kind == "web_search_tool_result":
            said["annotations"] += openai_citations(block)
    reply = {"role": "assistant", "content": None if said["tool_calls"] else "", "refusal": None,
             **{key: value for key, value in said.items() if value}}
    finish = FINISH_REASONS.get(message.get("stop_reason"), "stop")
    return {**openai_head(message, "chat.completion", request), "usage": openai_usage(message.get("usage") or {}),
            "choices": [{"index": 0, "message": reply, "logprobs": None, "finish_reason": finish}]}


OPENAI_MEMBERS = {"text": "content", "thinking": "reasoning_content"}    # type of block -> where its text goes


def openai_render_stream(events, request):
    """Chunks: the role first, the finish_reason, usage alone in one if the client asked for it, [DONE]."""
    head, usage, calls, arguments = {}, {}, -1, None    # arguments: whether the open call has any; None if no call is open

    def chunk(delta, finish=None):
        return encode_data({**head, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]})

    def call(function, **first):
        return chunk({"tool_calls": [{"index": calls, **first, "function": function}]})

    for event in events:
        if type(event) is Spliced:
            yield event.data
            continue
        kind, delta = event["type"], event.get("delta") or {}
        told = delta.get("type", "")[:-6]    # without "_delta"
        if told in OPENAI_MEMBERS:
            yield chunk({OPENAI_MEMBERS[told]: delta[told]})
        elif kind == "message_start":
            head = openai_head(event["message"], "chat.completion.chunk", request)
            yield chunk({"role": "assistant", "content": ""})
        elif kind == "content_block_start":
            block, arguments = event["content_block"], None
            if block.get("type") == "tool_use":
                calls, arguments = calls + 1, False
                yield call({"name": block["name"], "arguments": ""}, id=block["id"], type="function")
            elif block.get("type") == "web_search_tool_result" and openai_citations(block):
                yield chunk({"annotations": openai_citations(block)})
        elif kind == "content_block_stop" and arguments is False:
            yield call({"arguments": "{}"})
        elif delta.get("type") == "input_json_delta" and arguments is not None:
            arguments = True
            yield call({"arguments": delta["partial_json"]})
        elif kind == "message_delta":
            usage = event.get("usage") or {}
            yield chunk({}, FINISH_REASONS.get(delta.get("stop_reason"), "stop"))
        elif kind == "message_stop":
            if as_dict(as_dict(request.get("x-openai")).get("stream_options")).get("include_usage"):
                yield encode_data({**head, "choices": [], "usage": openai_usage(usage)})
            yield b"data: [DONE]\n\n"


def openai_error(error) -> dict:
    code = "context_length_exceeded" if OVERFLOW.search(error.message) else None
    return {"error": {"message": error.message, "type": error.type, "param": None, "code": code}}


def bearer(key) -> dict:
    return {"Authorization": key if key.startswith("Bearer ") else "Bearer " + key} if key else {}


OPENAI = Format("openai", openai_parse_request, openai_render_request, openai_parse_message, openai_render_message,
                openai_parse_stream, openai_render_stream, lambda url, model, stream: endpoint_url(url, "/chat/completions"),
                bearer, openai_plain_delta, openai_error, lambda error: encode_data(openai_error(error)), b": ping\n\n")


# --- OpenAI Responses

# A pivot request that came in this format carries "x-responses": {"body": the body as it came, "tools": {name of a function:
# {"type", "name"[, "namespace"]} of the client's own tool behind it}}: what only this format knows, and the way back for calls.

OWN_THOUGHT = "openai-responses:"    # begins the signature of a thought of a Responses provider; its item follows
SIGNED = "ccr:"                      # begins encrypted_content that is the signature of the thought in the pivot
MIN_OUTPUT_TOKENS = 16               # OpenAI refuses less; Claude Code asks for 1 to see whether a model exists
NO_REASONING = Pattern(r"(^|/)(gpt-3|gpt-4|chatgpt-)", re.I)    # these refuse `reasoning` as a whole
RESPONSES_FIELDS = {
    "model": "a string?", "input": "a string or a list", "instructions": "a string?", "tools": "a list?",
    "stream": "true or false?", "tool_choice": "a string or an object?", "parallel_tool_calls": "true or false?",
    "max_output_tokens": "an integer?", "temperature": "an integer or a number?", "top_p": "an integer or a number?",
    "reasoning": "an object?", "text": "an object?",
}
STATEFUL = {    # members that point at what a server has kept -> what to do instead
    "previous_response_id": "ccr keeps no responses; send the whole conversation in `input`",
    "conversation": "ccr keeps no conversations; send the whole conversation in `input`",
    "background": "ccr keeps no responses to be fetched later; use `stream`",
}


def responses_parse_request(body) -> dict:
    """The pivot request of a /v1/responses body. Codex's namespaces and custom tools become plain functions."""
    expect(body, "an object", "the body")
    for name, words in STATEFUL.items():
        if body.get(name):
            raise ApiError(400, "%s: %s" % (name, words))
    expect_fields(body, RESPONSES_FIELDS)
    check_limits(body)
    expect_fields(as_dict(body.get("reasoning")), {"effort": "a string?"}, "reasoning.")
    if not body["input"]:
        raise ApiError(400, "input: at least one item is required")
    reader, config, extra = ResponsesInput(body), {}, {}
    effort, form = as_dict(body.get("reasoning")).get("effort"), as_dict(as_dict(body.get("text")).get("format"))
    if effort not in (None, "none"):
        config["effort"] = "low" if effort == "minimal" else effort
    if form.get("type") == "json_object":
        extra["response_format"] = form
    elif form.get("type") == "json_schema":    # chat completions have the same, name and strictness included
        config["format"] = {"type": "json_schema", "schema": expect(form.get("schema"), "an object", "text.format.schema")}
        own = {key: value for key, value in form.items() if key != "type"}
        extra["response_format"] = {"type": "json_schema", "json_schema": own}
    request = {**{key: body.get(key) for key in ("model", "temperature", "top_p", "stream")},
               "max_tokens": body.get("max_output_tokens"), "system": "\n\n".join(reader.system), "messages": reader.messages,
               "tools": reader.tools, "tool_choice": reader.choice(body), "output_config": config, "x-openai": extra,
               "thinking": effort and {"type": "adaptive" if "effort" in config else "disabled"},
               "x-responses": {"body": body, "tools": reader.kinds}}
    return {key: value for key, value in request.items() if value not in (None, [], {}, "") or key == "messages"}


class ResponsesInput:
    """What the tools and items of a body come to: system, messages, tools, and `kinds`, how the client knows its tools.

    What OpenAI runs itself (web_search, file_search) is left out: Codex offers a search with each request."""

    def __init__(self, body):
        self.system = [body["instructions"]] if body.get("instructions") else []
        self.messages, self.tools, self.kinds, self.names = [], [], {}, {}
        self.read_tools(body.get("tools") or [], "tools")
        items = body["input"]
        for n, item in enumerate([{"role": "user", "content": items}] if isinstance(items, str) else items):
            path = "input.%d." % n
            kind = expect(expect(item, "an object", path[:-1]).get("type"), "a string?", path + "type")
            if kind == "item_reference" or kind is None and "role" not in item:
                item = KEPT.find(item.get("id"))
                if item is None:
                    raise ApiError(400, path + "id: ccr no longer has this item; send items whole (mostly: store false)")
                kind = as_text(item.get("type"))
            INPUT_ITEMS.get(kind or "message", ResponsesInput.unknown)(self, item, path)

    def read_tools(self, tools, path, namespace=None):
        for n, tool in enumerate(tools):
            place = "%s.%d" % (path, n)
            kind = as_text(expect(tool, "an object", place).get("type"))
            if kind == "namespace":
                expect_fields(tool, {"name": "a string", "tools": "a list"}, place + ".")
                self.read_tools(tool["tools"], place + ".tools", tool["name"])
            elif kind in ("function", "custom"):
                expect_fields(tool, {"name": "a string", "description": "a string?", "parameters": "an object?"}, place + ".")
                self.add_tool(self.name(kind, tool["name"], namespace), tool)
            elif kind == "tool_search" and tool.get("execution") == "client":
                self.add_tool(self.name(kind, kind), tool)

    def add_tool(self, name, tool):
        """Adds a function, once: what a tool_search found comes again with each request."""
        if any(known["name"] == name for known in self.tools):
            return
        grammar = as_text(as_dict(tool.get("format")).get("definition"))
        words = [tool.get("description"), grammar and "The input must follow this grammar:\n" + grammar]
        words = "\n\n".join(filter(None, words))
        schema = CUSTOM_PARAMETERS if tool["type"] == "custom" else tool.get("parameters") or {"type": "object", "properties": {}}
        self.tools.append({"name": name, **({"description": words} if words else {}), "input_schema": schema,
                           **({"strict": True} if tool.get("strict") else {})})

    def name(self, kind, name, namespace=None) -> str:
        """The pivot's name of a tool of the client: unique, and one that every provider takes."""
        known = self.names.get((namespace, name))
        if known is None:
            known = flat_name(name, namespace)
            if known in self.names.values():
                known = flat_name("%s in %s" % (name, namespace), kind)
            self.names[namespace, name] = known
            self.kinds[known] = {"type": kind, "name": name, **({"namespace": namespace} if namespace else {})}
        return known

    def choice(self, body):
        """tool_choice in the pivot, None where none is needed."""
        own = as_dict(body.get("tool_choice"))
        kind = as_text(own.get("type"))
        plain = {"auto": "auto", "required": "any", "none": "none"}.get(as_text(body.get("tool_choice")))
        found = {"type": plain} if plain else None
        if kind in ("function", "custom"):
            expect_fields(own, {"name": "a string", "namespace": "a string?"}, "tool_choice.")
            found = {"type": "tool", "name": self.names.get((own.get("namespace"), own["name"]), own["name"])}
        if body.get("parallel_tool_calls") is False:
            found = {**(found or {"type": "auto"}), "disable_parallel_tool_use": True}
        return found if self.tools else None

    def add(self, role, blocks):
        """Adds blocks to the last message where they belong: an assistant's turn, results and the user's words after them."""
        last = self.messages[-1] if self.messages else {}
        is_open = role == "assistant" or blocks and last.get("content", [{}])[-1].get("type") == "tool_result"
        if last.get("role") == role and is_open:
            last["content"] += blocks
        elif blocks:
            self.messages.append({"role": role, "content": blocks})

    def message(self, item, path):
        role = item.get("role")
        if role not in ("user", "assistant", "system", "developer"):
            raise ApiError(400, "%srole: expected user, assistant, system or developer, got %s" % (path, json.dumps(role)[:80]))
        blocks = responses_parts(item.get("content"), path + "content")
        if role in ("user", "assistant"):
            self.add(role, blocks)
        elif self.messages:
            self.add("system", blocks)
        else:    # what stands before the conversation is its system prompt: Codex sends no instructions
            self.system += filter(None, [text_of(blocks)])

    def thought(self, item, path):
        self.add("assistant", blocks_of_thought(item))

    def call(self, item, path):
        kind = RESPONSES_CALLS[item["type"]]
        item = {**item, "name": kind} if kind == "tool_search" else item
        expect_fields(item, {"call_id": "a string", "name": "a string", "namespace": "a string?", "input": "a string?"}, path)
        value = {"input": item.get("input") or ""} if kind == "custom" else call_input(item.get("arguments"), path + "arguments")
        name = self.name(kind, item["name"], item.get("namespace"))
        self.add("assistant", [{"type": "tool_use", "id": item["call_id"], "name": name, "input": value}])

    def result(self, item, path):
        content, id = item.get("output"), expect(item.get("call_id"), "a string", path + "call_id")
        content = content if isinstance(content, str) else responses_parts(content, path + "output")
        self.add("user", [parsed_result(id, content)])

    def found_tools(self, item, path):
        """What a tool_search found: tools of this request too, though `tools` does not list them."""
        had = len(self.tools)
        self.read_tools(expect(item.get("tools"), "a list?", path + "tools") or [], path + "tools")
        names = ", ".join(tool["name"] for tool in self.tools[had:])
        self.result({**item, "output": "You can now call: " + names if names else "No new tools."}, path)

    def unknown(self, item, path):
        self.add("system", [{"type": "text", "text": "[an item of type %s was left out]" % item.get("type")}])


RESPONSES_CALLS = {    # type of an item that calls a tool -> type of the tool
    "function_call": "function", "custom_tool_call": "custom", "tool_search_call": "tool_search",
}
INPUT_ITEMS = {
    "message": ResponsesInput.message, "reasoning": ResponsesInput.thought, **dict.fromkeys(RESPONSES_CALLS, ResponsesInput.call),
    "function_call_output": ResponsesInput.result, "custom_tool_call_output": ResponsesInput.result,
    "tool_search_output": ResponsesInput.found_tools,
    "web_search_call": lambda *_: None,    # what it found is in the text after it
}
CUSTOM_PARAMETERS = {"type": "object", "required": ["input"], "additionalProperties": False,
                     "properties": {"input": {"type": "string", "description": "The whole input of the tool as plain text."}}}


class KeptItems:
    """The newest items of replies, for clients that send back only an item's id: Vercel's AI SDK without store: false."""

    def __init__(self, most_bytes):
        self.most, self.size, self.texts, self.lock = most_bytes, 0, {}, threading.Lock()

    def keep(self, item) -> None:
        id, text = as_text(as_dict(item).get("id")), dump_json(item)
        with self.lock:
            self.size += len(text) - len(self.texts.pop(id, b""))    # there are servers that give each reply the same ids
            self.texts[id] = text
            while self.size > self.most:
                self.size -= len(self.texts.pop(next(iter(self.texts))))

    def find(self, id):
        text = self.texts.get(as_text(id) or None)
        return text and json.loads(text)


KEPT = KeptItems(16 << 20)


def flat_name(name, namespace=None) -> str:
    """One name for a tool, its namespace in front: at most 64 of [A-Za-z0-9_-], with a checksum where that alters it."""
    whole = "%s__%s" % (namespace, name) if namespace else name
    clean = re.sub(r"[^A-Za-z0-9_-]", "_", whole)
    if clean == whole and 0 < len(whole) <= 64:
        return whole
    import zlib
    return "%s_%08x" % (clean[:55], zlib.crc32(whole.encode("utf-8", "surrogatepass")))


def responses_parts(content, path) -> list:
    """The blocks of a string or of a list of parts."""
    if isinstance(expect(content, "a string or a list?", path), str):
        return [{"type": "text", "text": content}] if content else []
    return [responses_part(part, "%s.%d" % (path, n)) for n, part in enumerate(content or [])]


def responses_part(part, path) -> dict:
    kind = as_text(expect(part, "an object", path).get("type"))
    if kind in ("input_text", "output_text", "text", "refusal"):
        text = part.get("refusal" if kind == "refusal" else "text")
        return {"type": "text", "text": expect(text, "a string", path + ".text")}
    member = next((member for member in MEDIA_PARTS.get(kind, ()) if part.get(member) is not None), None)
    if not member:
        return {"type": "text", "text": "[a part of type %s was left out]" % kind}
    title = {"title": part["filename"]} if isinstance(part.get("filename"), str) else {}
    return {"type": "image" if kind == "input_image" else "document",
            "source": media_source(expect(part[member], "a string", "%s.%s" % (path, member))), **title}


MEDIA_PARTS = {"input_image": ("image_url",), "input_file": ("file_url", "file_data")}


# a thought: its reasoning item, and the block that leads back to it

def thought_text(item) -> str:
    """The summary, or else the raw thought, of a reasoning item."""
    summary, raw = ([as_text(part.get("text")) for part in dicts_in(item.get(member))] for member in ("summary", "content"))
    return "\n\n".join(summary or raw)


def sign_thought(item) -> str:
    """A signature that holds the item as it came; "" for a summary alone, which no provider takes back."""
    members = ("id", "summary", "content", "encrypted_content")
    own = {key: item[key] for key in members if item.get(key) not in (None, [], "", SIGNED)}
    return OWN_THOUGHT + dump_json(own).decode() if "content" in own or "encrypted_content" in own else ""


def blocks_of_thought(item) -> list:
    """The block of a reasoning item that a client sends back; none when there is nothing in it."""
    text, secret = thought_text(item), as_text(item.get("encrypted_content"))
    signature = secret[len(SIGNED):] if secret.startswith(SIGNED) else sign_thought(item)
    return [{"type": "thinking", "thinking": text, "signature": signature}] if text or signature else []


def item_of_thought(signature):
    """The reasoning item in such a signature; None if another provider signed."""
    item = json_or_text(signature[len(OWN_THOUGHT):]) if signature.startswith(OWN_THOUGHT) else None
    return {"summary": [], **item, "type": "reasoning"} if isinstance(item, dict) else None


# to a provider

def responses_render_request(request) -> dict:
    """The /v1/responses body of a request. The provider stores nothing: its encrypted reasoning comes back with the history."""
    known, model = as_dict(as_dict(request.get("x-responses")).get("body")), as_text(request.get("model"))
    known = known if knows_all(known, model) else {}
    body = {"store": False, **responses_reasoning(request, as_dict(known.get("reasoning"))),
            **{key: value for key, value in known.items() if key not in RESPONSES_FIELDS},
            **{key: request[key] for key in ("model", "stream", "temperature", "top_p") if request.get(key) is not None},
            "input": list(responses_input(request["messages"])), **responses_tools(request)}
    system = system_blocks(request)
    if system:
        body["instructions"] = "\n\n".join(block["text"] for block in system)
    if request.get("max_tokens"):
        body["max_output_tokens"] = max(request["max_tokens"], MIN_OUTPUT_TOKENS)
    text, schema = as_dict(known.get("text")), output_format(request)
    form = as_dict(as_dict(request.get("x-openai")).get("response_format")) or schema and openai_response_format(schema)
    if form:
        text = {**text, "format": {"type": form.get("type"), **as_dict(form.get("json_schema"))}}
    return {**body, "text": text} if text else body


def responses_own_item(item: dict) -> dict:
    """An input item that goes on as it came, without what the SDKs add to their copy of a reply: OpenAI refuses it."""
    own = {key: value for key, value in item.items() if key != "parsed_arguments"}
    if isinstance(own.get("content"), list):
        own["content"] = [{key: value for key, value in part.items() if key != "parsed"} for part in dicts_in(own["content"])]
    return own


def knows_all(body, model) -> bool:
    """Whether a provider of this model understands the body as it is: only OpenAI has namespaces, custom tools, tool_search."""
    tools = dicts_in(as_dict(body).get("tools"))
    return bool(OPENAI_MODEL.search(model)) or all(tool.get("type") == "function" for tool in tools)


OPENAI_MODEL = Pattern(r"(^|/)(gpt-[3-9]|chatgpt|codex|o[1-9])", re.I)


def responses_reasoning(request, own) -> dict:
    """The members reasoning and include: an effort, a summary to be shown meanwhile, and the thought to be sent back."""
    effort = effort_of(request)
    told = {**({"effort": COMMON_EFFORTS.get(effort, effort)} if effort else {}), **own}
    is_on = told or as_dict(request.get("thinking")).get("type") in ("enabled", "adaptive")
    if NO_REASONING.search(as_text(request.get("model"))) or not is_on:
        return {}
    return {"reasoning": {"summary": "auto", **told}, "include": ["reasoning.encrypted_content"]}


def responses_tools(request) -> dict:
    """The members tools, tool_choice and parallel_tool_calls. No tool is strict unless it was: strict mode, the default there,
    makes optional parameters required."""
    tools = [{"type": "function", "name": tool["name"], "description": tool.get("description") or "",
              "parameters": tool["input_schema"], "strict": tool.get("strict") is True} for tool in functions_of(request)]
    for tool in filter(is_web_search, request.get("tools") or []):
        allowed = tool.get("allowed_domains")
        tools.append({"type": "web_search", **({"filters": {"allowed_domains": allowed}} if allowed else {})})
    if not tools:
        return {}
    choice = as_dict(request.get("tool_choice"))
    wanted = TOOL_CHOICES.get(as_text(choice.get("type")))
    if choice.get("type") == "tool":    # a choice of a tool that was left out goes with it
        chosen = [tool for tool in tools if tool.get("name", "web_search") == choice.get("name")]
        wanted = next(({key: tool[key] for key in ("type", "name") if key in tool} for tool in chosen), None)
    return {"tools": tools, **({"tool_choice": wanted} if wanted else {}),
            **({"parallel_tool_calls": False} if choice.get("disable_parallel_tool_use") else {})}


def responses_input(messages):
    """The input items of the conversation."""
    for message in settled(messages):
        if message["role"] == "assistant":
            yield from filter(None, map(responses_said, blocks_of(message)))
            continue
        parts = []
        for block in blocks_of(message):
            if block.get("type") == "tool_result":
                yield {"type": "function_call_output", "call_id": block["tool_use_id"], "output": responses_output(block)}
            else:
                parts += input_parts(block)
        if parts:
            yield {"type": "message", "role": message["role"], "content": parts}


def responses_said(block):
    """The item of an assistant's block; None for an empty one and for the thought of another provider."""
    if block.get("type") == "tool_use":
        return item_of_call(None, block, openai_call(block)["function"]["arguments"])
    if block.get("type") == "thinking":
        return item_of_thought(as_text(block.get("signature")))
    text = block_text(block)
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]} if text else None


def item_of_call(kind, block, arguments) -> dict:
    """The item of a call in the form in which the other side knows the tool: `kind`, or a plain function."""
    kind = kind or {"type": "function", "name": block["name"]}
    place = {**kind, "call_id": block["id"]}
    if kind["type"] == "custom":
        return {**place, "type": "custom_tool_call", "input": custom_text(arguments)}
    if kind["type"] == "tool_search":
        value = call_input(arguments, "arguments")
        return {"type": "tool_search_call", "call_id": block["id"], "execution": "client", "arguments": value}
    return {**place, "type": "function_call", "arguments": arguments}


def custom_text(arguments: str) -> str:
    """The text for a custom tool: the input among the arguments, or all that the model wrote where it kept to no form."""
    text = as_dict(json_or_text(arguments)).get("input")
    return text if isinstance(text, str) else arguments


def responses_output(block):
    """The output of a call: a string, or parts where an image or a file is in it."""
    content = block.get("content")
    if not isinstance(content, list) or not any(item.get("type") in ("image", "document") for item in content):
        return result_parts(block)[0]
    mark = [{"type": "input_text", "text": ERROR_MARK.strip()}] if block.get("is_error") else []
    return mark + [part for item in content for part in input_parts(item)]


def input_parts(block) -> list:
    """The content part of a block; none for an empty one."""
    kind, url = block.get("type"), image_url(block)
    if kind == "image" and url:
        return [{"type": "input_image", "detail": "auto", "image_url": url}]
    if kind == "document" and url:
        data = {"file_url": url}
        if as_text(url).startswith("data:"):
            data = {"filename": block.get("title") or "document.pdf", "file_data": url}
        return [{"type": "input_file", **data}]
    text = block_text(block)
    return [{"type": "input_text", "text": text}] if text else []


# from a provider

def responses_parse_stream(frames, writer):
    """The events of a Responses stream. ApiError when it fails, or ends before it says how it ended."""
    reader = ResponsesOutput(writer)
    for frame in frames:
        if type(frame) is Spliced:
            writer.note(frame)
            yield frame
        elif frame.strip() != b"[DONE]":
            yield from reader.read(as_dict(parse_json(frame, "a frame of the provider's stream")))
            if reader.is_complete:
                return
    raise ApiError(502, "the provider's stream ended too early: it never said response.completed")


def responses_parse_message(body) -> dict:
    """The message of a whole reply, told as if it were the last event of a stream."""
    body = as_dict(body)
    if not isinstance(body.get("output"), list) or body.get("status") not in (None, "completed", "incomplete"):
        raise error_in(body) if body.keys() & set(ERROR_KEYS) else \
            ApiError(502, "the provider's reply is no finished response: %s" % json.dumps(body)[:200])
    writer = BlockWriter(new_id("msg_"), as_text(body.get("model")))
    return fold(ResponsesOutput(writer).read({"type": "response.completed", "response": body}))


class ResponsesOutput:
    """Tells a BlockWriter what a Responses provider says: live where deltas come, the rest when an item is complete."""

    def __init__(self, writer):
        self.writer, self.is_complete = writer, False
        self.noted, self.texts = set(), set()    # call_ids and types of the items so far; keys of the messages that deltas told
        self.thought = (None, None, None)    # what was told last of a thought: key of its item, type of event, part
        self.links, self.queries = {}, []

    def read(self, event):
        kind, response = as_text(event.get("type")), as_dict(event.get("response"))
        if kind in ("error", "response.failed", "response.cancelled") or event.get("error") or response.get("error"):
            own = {key: event.get(key) for key in ("code", "message")}
            raise error_in({"error": event.get("error") or response.get("error") or own})
        if kind in ("response.completed", "response.incomplete"):
            return self.end(response)
        return OUTPUT_EVENTS[kind](self, event) if kind in OUTPUT_EVENTS else []

    def note(self, event) -> tuple:
        """(the item, its key) of an event."""
        item = as_dict(event.get("item"))
        self.noted |= {as_text(item.get("type")), call_id(item)}
        return item, item_key(event)

    def added(self, event):
        item, key = self.note(event)
        return self.call(item, key) if as_text(item.get("type")) in RESPONSES_CALLS else self.part()

    def call(self, item, key, args=""):
        name = "tool_search" if item["type"] == "tool_search_call" else as_text(item.get("name"))
        return self.writer.tool(key, call_id(item), name, args)

    def part(self, event=None):
        """What follows is another part of the text, and a block of its own."""
        return self.writer._close() if self.writer.open == ("text", None) and not self.writer.waiting else []

    def text(self, event):
        self.texts.add(item_key(event))
        return self.writer.text(as_text(event.get("delta")))

    def think(self, event):
        """A piece of a summary or of the raw thought; of an item that has both, the one that comes first is told."""
        (key, kind, part), now = self.thought, (item_key(event), event["type"], event.get("summary_index"))
        if key == now[0] and kind != now[1]:
            return []
        self.thought = now
        return self.writer.thinking(("\n\n" if key == now[0] and part != now[2] else "") + as_text(event.get("delta")))

    def arguments(self, event):
        return self.writer.tool(item_key(event), args=as_text(event.get("delta")))

    def done(self, event):
        return self.whole(*self.note(event))

    def whole(self, item, key):
        kind = as_text(item.get("type"))
        return OUTPUT_ITEMS[kind](self, item, key) if kind in OUTPUT_ITEMS else []

    def call_done(self, item, key):
        """The rest of the arguments; all of them where no delta came."""
        whole, told = item.get("arguments") or "", "".join(self.writer.calls[key].parts) if key in self.writer.calls else ""
        whole = whole if isinstance(whole, str) else json.dumps(whole)
        rest = whole[len(told):] if whole.startswith(told) else ""
        if whole and not rest and json_or_text(whole) != json_or_text(told):
            raise ApiError(502, "the provider sent two different arguments for one call of %s" % item.get("name"))
        return self.call(item, key, rest)

    def message_done(self, item, key):
        events = []
        for part in dicts_in(item.get("content")):
            for note in dicts_in(part.get("annotations")):
                if note.get("type") == "url_citation" and isinstance(note.get("url"), str):
                    self.links.setdefault(note["url"], as_text(note.get("title")) or note["url"])
            if key not in self.texts:
                events += self.part() + self.writer.text(as_text(part.get("text")) or as_text(part.get("refusal")))
        return events

    def thought_done(self, item, key):
        is_told = self.thought[0] == key and key is not None
        return ([] if is_told else self.writer.thinking(thought_text(item))) + self.writer.signature(sign_thought(item))

    def search_done(self, item, key):
        action = as_dict(item.get("action"))
        queries = action.get("queries") if isinstance(action.get("queries"), list) else [action.get("query")]
        self.queries.append("; ".join(filter(None, map(as_text, queries))))
        return []

    def end(self, response):
        """What no event told before, the links that were cited, and the end of the message."""
        noted = self.noted - {""}
        for n, item in enumerate(dicts_in(response.get("output"))):
            kind = as_text(item.get("type"))
            if (call_id(item) if kind in RESPONSES_CALLS else kind) not in noted:
                yield from self.whole(item, ("late", n))
        if self.links:
            for block in search_blocks(self.links, "; ".join(filter(None, self.queries))):
                yield from self.writer.block(block)
        reason = as_dict(response.get("incomplete_details")).get("reason") or response.get("status") or "completed"
        stop = {"content_filter": "refusal", "completed": None}.get(as_text(reason), "max_tokens")
        self.is_complete = True
        yield from self.writer.finish(stop, responses_parse_usage(as_dict(response.get("usage")), len(self.queries)))


OUTPUT_EVENTS = {
    "response.output_item.added": ResponsesOutput.added,
    "response.output_item.done": ResponsesOutput.done,
    "response.content_part.added": lambda reader, event: reader.part() if event.get("content_index") else [],
    "response.output_text.delta": ResponsesOutput.text,
    "response.refusal.delta": ResponsesOutput.text,
    "response.reasoning_summary_text.delta": ResponsesOutput.think,
    "response.reasoning_text.delta": ResponsesOutput.think,
    "response.function_call_arguments.delta": ResponsesOutput.arguments,
}
OUTPUT_ITEMS = {
    "message": ResponsesOutput.message_done, "reasoning": ResponsesOutput.thought_done,
    "web_search_call": ResponsesOutput.search_done, **dict.fromkeys(RESPONSES_CALLS, ResponsesOutput.call_done),
}


def item_key(event):
    """What tells the items of one reply apart."""
    index = event.get("output_index")
    return index if isinstance(index, int) else as_text(event.get("item_id") or as_dict(event.get("item")).get("id"))


def call_id(item) -> str:
    return as_text(item.get("call_id")) or as_text(item.get("id"))


def responses_parse_usage(usage, searches) -> dict:
    details = as_dict(usage.get("input_tokens_details"))
    return told_usage(first_count(usage.get("input_tokens")), first_count(details.get("cached_tokens")),
                      first_count(details.get("cache_write_tokens")), first_count(usage.get("output_tokens")), searches)


def told_usage(told, read, written, output, searches) -> dict:
    """Usage in the pivot: input_tokens without what was read from a cache or written to it. {} where nothing was counted."""
    counts = {"input_tokens": max(told - read - written, 0), "cache_creation_input_tokens": written,
              "cache_read_input_tokens": read, "output_tokens": output}
    return {**(counts if told or output else {}), **({"server_tool_use": {"web_search_requests": searches}} if searches else {})}


def responses_plain_delta(event):
    """(kind, text) of an event that is nothing but a piece of text or of a call's arguments."""
    kind = event.get("type")
    kind = {"response.output_text.delta": "text", "response.function_call_arguments.delta": ("tool", item_key(event))}.get(kind)
    return (kind, event["delta"]) if kind and isinstance(event.get("delta"), str) else None


# to a client

def responses_render_stream(events, request):
    """The reply as a Responses stream: response.created first, response.completed or response.incomplete last."""
    writer = ResponsesWriter(request)
    try:
        for event in events:
            for told in writer.tell(event):
                yield encode_event(told)
    except ApiError as error:
        error.response_id, error.sequence = as_dict(writer.response).get("id"), writer.sequence
        raise


def responses_render_message(message, request) -> dict:
    writer = ResponsesWriter(request)
    for event in unfold(message):
        list(writer.tell(event))
    return writer.response


class ResponsesWriter:
    """Tells a Responses client what the events say; `response` is the reply so far.

    Each item is announced, told in pieces, and told whole: the SDKs' helpers put the reply together by index from the first two,
    Codex believes only the last.
    """

    def __init__(self, request):
        own = as_dict(request.get("x-responses"))
        self.model, self.created = request.get("model"), request.get("x-created", 0)
        self.kinds, self.known = as_dict(own.get("tools")), as_dict(own.get("body"))
        self.response, self.sequence, self.links = None, 0, {}
        self.block, self.item, self.pieces, self.signature = {}, {}, [], ""

    def tell(self, event):
        """The events for one of Anthropic's."""
        event = event["delta"] if event["type"] == "content_block_delta" else event
        step = TOLD.get(event.get("type"))
        return step(self, event) if step else ()

    def say(self, kind, **members) -> dict:
        self.sequence += 1
        return {"type": "response." + kind, "sequence_number": self.sequence - 1, **members}

    def of_item(self, kind, **members) -> dict:
        return self.say(kind, item_id=self.item["id"], output_index=len(self.response["output"]), **members)

    def begin(self, event):
        message = event["message"]
        self.response = {
            "id": message["id"].replace("msg_", "resp_", 1), "object": "response", "created_at": self.created, "error": None,
            "status": "in_progress", "incomplete_details": None, "model": message.get("model") or self.model, "usage": None,
            "output": [], **{member: self.known.get(member, default) for member, default in ECHOED.items()}}
        yield self.say("created", response=dict(self.response))
        yield self.say("in_progress", response=dict(self.response))

    def open(self, event):
        self.block, self.item, self.pieces, self.signature = event["content_block"], {}, [], ""
        kind = self.block["type"]
        if kind == "text":
            yield self.announce("msg_", {"type": "message", "status": "in_progress", "role": "assistant", "content": []})
            yield self.of_item("content_part.added", content_index=0, part=output_text(""))
        elif kind == "thinking":
            yield self.announce("rs_", {"type": "reasoning", "summary": []})
        elif kind == "tool_use":
            item = item_of_call(self.kinds.get(self.block["name"]), self.block, "")
            yield self.announce(ITEM_IDS[item["type"]], {**item, "status": "in_progress"})

    def announce(self, prefix, item) -> dict:
        self.item = {"id": new_id(prefix), **item}
        return self.say("output_item.added", output_index=len(self.response["output"]), item=self.item)

    def complete(self, **members) -> dict:
        item = {**self.item, **({"status": "completed"} if "status" in self.item else {}), **members}
        event = self.say("output_item.done", output_index=len(self.response["output"]), item=item)
        self.response["output"].append(item)
        if self.known.get("store") is not False:
            KEPT.keep(item)
        return event

    def text(self, delta):
        self.pieces.append(delta["text"])
        yield self.of_item("output_text.delta", content_index=0, delta=delta["text"], logprobs=[])

    def think(self, delta):
        if not self.pieces:
            yield self.of_item("reasoning_summary_part.added", summary_index=0, part=summary_text(""))
        self.pieces.append(delta["thinking"])
        yield self.of_item("reasoning_summary_text.delta", summary_index=0, delta=delta["thinking"])

    def sign(self, delta):
        self.signature = delta["signature"]
        return ()

    def arguments(self, delta):
        self.pieces.append(delta["partial_json"])
        if self.item.get("type") == "function_call":
            yield self.of_item("function_call_arguments.delta", delta=delta["partial_json"])

    def close(self, event):
        step = CLOSED.get(self.block["type"])
        return step(self, "".join(self.pieces)) if step else ()

    def close_text(self, text):
        part = output_text(text)
        yield self.of_item("output_text.done", content_index=0, text=text, logprobs=[])
        yield self.of_item("content_part.done", content_index=0, part=part)
        yield self.complete(content=[part])

    def close_thought(self, text):
        """The end of a thought; encrypted_content even where nobody signed: some clients send back only what has it."""
        signature, parts = self.signature or self.block.get("signature") or "", [summary_text(text)] if text else []
        if text:
            yield self.of_item("reasoning_summary_text.done", summary_index=0, text=text)
            yield self.of_item("reasoning_summary_part.done", summary_index=0, part=parts[0])
        yield self.complete(encrypted_content=SIGNED + signature, summary=parts)

    def close_call(self, text):
        """The end of a call. A custom tool's text is told here: until then it stands in JSON."""
        item = item_of_call(self.kinds.get(self.block["name"]), self.block, text or "{}")
        if item["type"] == "function_call":
            yield self.of_item("function_call_arguments.done", arguments=item["arguments"], name=item["name"])
        elif item["type"] == "custom_tool_call":
            yield self.of_item("custom_tool_call_input.delta", delta=item["input"])
            yield self.of_item("custom_tool_call_input.done", input=item["input"])
        yield self.complete(**item)

    def close_found(self, text):
        for source in dicts_in(self.block.get("content")):
            self.links.setdefault(source.get("url"), source.get("title"))
        return ()

    def finish(self, event):
        reason = RESPONSES_REASONS.get(as_dict(event.get("delta")).get("stop_reason"))
        self.response["incomplete_details"] = {"reason": reason} if reason else None
        self.response["usage"] = responses_usage(as_dict(event.get("usage")))
        return ()

    def end(self, event):
        """The last event. Links belong to the last text, though they may have come after it."""
        parts = [part for item in self.response["output"] if item["type"] == "message" for part in item["content"]]
        for part in parts[-1:]:
            place = dict.fromkeys(("start_index", "end_index"), len(part["text"]))
            part["annotations"] += [{"type": "url_citation", "url": url, "title": title or url, **place}
                                    for url, title in self.links.items() if url]
        self.response["status"] = "incomplete" if self.response["incomplete_details"] else "completed"
        yield self.say(self.response["status"], response=self.response)


TOLD = {    # type of an event, or of a delta -> how it is told
    "message_start": ResponsesWriter.begin, "message_delta": ResponsesWriter.finish, "message_stop": ResponsesWriter.end,
    "content_block_start": ResponsesWriter.open, "content_block_stop": ResponsesWriter.close,
    "text_delta": ResponsesWriter.text, "thinking_delta": ResponsesWriter.think, "signature_delta": ResponsesWriter.sign,
    "input_json_delta": ResponsesWriter.arguments,
}
CLOSED = {
    "text": ResponsesWriter.close_text, "thinking": ResponsesWriter.close_thought, "tool_use": ResponsesWriter.close_call,
    "web_search_tool_result": ResponsesWriter.close_found,
}
ITEM_IDS = {"function_call": "fc_", "custom_tool_call": "ctc_", "tool_search_call": "tsc_"}
RESPONSES_REASONS = {    # stop_reason -> why a response is incomplete
    "max_tokens": "max_output_tokens", "model_context_window_exceeded": "max_output_tokens", "refusal": "content_filter",
}
ECHOED = {    # members of the body that the response repeats -> what they are where the body has none
    "instructions": None, "max_output_tokens": None, "metadata": {}, "parallel_tool_calls": True, "previous_response_id": None,
    "reasoning": None, "store": False, "temperature": None, "text": {"format": {"type": "text"}}, "tool_choice": "auto",
    "tools": [], "top_p": None, "truncation": "disabled",
}


def output_text(text) -> dict:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def summary_text(text) -> dict:
    return {"type": "summary_text", "text": text}


def responses_usage(usage) -> dict:
    read, written, output = (usage.get(name + "_tokens") or 0 for name in ("cache_read_input", "cache_creation_input", "output"))
    total = (usage.get("input_tokens") or 0) + read + written
    return {"input_tokens": total, "input_tokens_details": {"cached_tokens": read, "cache_write_tokens": written},
            "output_tokens": output, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": total + output}


def responses_stream_error(error) -> bytes:
    """response.failed, since Codex ignores an `error` event; the code tells it whether to ask again, "try again in" when."""
    code, message = "server_error", error.message
    if OVERFLOW.search(message):
        code = "context_length_exceeded"
    elif error.status == 429:
        code, message = "rate_limit_exceeded", message + (" (try again in %ss)" % error.retry_after if error.retry_after else "")
    elif 400 <= error.status < 500 and error.status != 408:
        code = "invalid_prompt"
    response = {"id": getattr(error, "response_id", None) or new_id("resp_"), "object": "response", "created_at": 0, "output": [],
                "status": "failed", "error": {"code": code, "message": message}, "incomplete_details": None, "usage": None}
    return encode_event({"type": "response.failed", "sequence_number": getattr(error, "sequence", 0), "response": response})


def responses_endpoint(url, model, stream) -> str:
    address, query = split_url(url)
    return endpoint_url(re.sub(r"/(chat/completions|messages)$", "", address) + query, "/responses")


RESPONSES = Format(
    "responses", responses_parse_request, responses_render_request, responses_parse_message, responses_render_message,
    responses_parse_stream, responses_render_stream, responses_endpoint, bearer, responses_plain_delta, openai_error,
    responses_stream_error, b": ping\n\n")


# --- Gemini and Vertex

GEMINI_SIGNATURE = "gemini:"    # begins the signature of a thinking block that holds the thoughtSignature of the call after it
NO_SIGNATURE = "skip_thought_signature_validator"    # Google's stand-in for the signature of a call that another model made
GEMINI_ID = Pattern(r"[A-Za-z0-9_-]{1,64}$")

GEMINI_EFFORTS = {    # effort -> (thinkingLevel of Gemini 3 and later, thinkingBudget of 2.5)
    "low": ("low", 1024), "medium": ("medium", 8192), "high": ("high", 24576), "xhigh": ("high", 32768), "max": ("high", 32768),
}
GEMINI_BUDGETS = (("pro", 128, 32768, 128), ("lite", 512, 24576, 0), ("", 1, 24576, 0))    # least, most, off; Pro never stops
GEMINI_FINISHES = {    # finishReason -> stop_reason
    "STOP": None, "MAX_TOKENS": "max_tokens",
    **dict.fromkeys(("SAFETY", "RECITATION", "BLOCKLIST", "SPII", "PROHIBITED_CONTENT", "LANGUAGE", "MODEL_ARMOR", "IMAGE_SAFETY",
                     "IMAGE_PROHIBITED_CONTENT", "IMAGE_RECITATION"), "refusal"),
}
GEMINI_FAILURES = {    # finishReason of an answer that is none; asked again, the model mostly does better
    "MALFORMED_FUNCTION_CALL": "the model wrote a tool call that cannot be read",
    "UNEXPECTED_TOOL_CALL": "the model called a tool that it was not offered",
    "TOO_MANY_TOOL_CALLS": "the model called too many tools in a row",
    "MISSING_THOUGHT_SIGNATURE": "a thought signature is missing from the conversation",
    "MALFORMED_RESPONSE": "the model wrote an answer that cannot be read",
    "OTHER": "the model stopped for a reason that it does not tell",
}


def gemini_render_request(request: dict) -> dict:
    """The generateContent body. Model and streaming are told by the URL."""
    generation, functions = gemini_generation(request.get("model")), functions_of(request)
    body = {"contents": gemini_contents(request["messages"], generation),
            "systemInstruction": {"parts": [{"text": block["text"]} for block in system_blocks(request)]},
            "generationConfig": gemini_config(request, generation, bool(functions)), **gemini_tools(request, functions)}
    return {key: value for key, value in body.items() if value not in ({}, {"parts": []})}


def gemini_generation(model) -> tuple:
    """(2, 5) of "gemini-2.5-pro"; (99, 0), the newest, of "gemini-flash-latest" and other names; (0, 0) of Gemma."""
    found = re.search(r"gemini-(\d+)(?:\.(\d+))?", as_text(model).lower())
    return (int(found.group(1)), int(found.group(2) or 0)) if found else (0, 0) if "gemma" in as_text(model).lower() else (99, 0)


def gemini_contents(messages: list, generation: tuple) -> list:
    """The conversation: results in a content of their own right after their calls, as Gemini counts them against the calls;
    role:system messages, which Gemini lacks, as the user's."""
    contents, calls = [], {}
    for message in without_system_roles(settled(messages)):
        blocks = blocks_of(message)
        if message["role"] == "assistant":
            calls = {block["id"]: (n, block["name"]) for n, block in enumerate(blocks) if block.get("type") == "tool_use"}
            contents.append({"role": "model", "parts": gemini_parts(blocks, generation >= (3, 0), NO_SIGNATURE)})
            continue
        results = [block for block in blocks if block.get("type") == "tool_result"]
        responses, rest = [], []
        for block in sorted(results, key=lambda block: calls[block["tool_use_id"]]):    # as the calls: Gemini 2 knows no ids
            response, media = gemini_response(block, calls[block["tool_use_id"]][1], generation)
            responses.append(response)
            rest += media
        rest += filter(None, [gemini_part(block) for block in blocks if block.get("type") != "tool_result"])
        contents += [{"role": "user", "parts": responses}, {"role": "user", "parts": rest}]
    return [content for content in contents if content["parts"]]


def gemini_parts(blocks: list, with_ids: bool, stand_in=None) -> list:
    """What a model said, as parts. The signature that a thinking block carries returns to the call it came with; the first call
    of a message without one gets the stand-in. Thoughts themselves are not sent back: Gemini does not read them."""
    parts, signature = [], None
    for block in blocks:
        if block.get("type") == "thinking":
            signed = as_text(block.get("signature"))
            signature = signed[len(GEMINI_SIGNATURE):] if signed.startswith(GEMINI_SIGNATURE) else signature
        elif block.get("type") == "tool_use":
            call, signature = {"name": block["name"], "args": as_dict(block.get("input"))}, signature or stand_in
            part = {"functionCall": {"id": block["id"], **call} if with_ids else call}
            parts.append({**part, "thoughtSignature": signature} if signature else part)
            signature = stand_in = None
        else:
            parts += filter(None, [gemini_part(block)])
    return parts


def gemini_part(block: dict) -> dict:
    """A block as a part; {} for an empty one."""
    source, kind = as_dict(block.get("source")), block.get("type")
    if kind in ("image", "document") and source.get("type") == "base64":
        return {"inlineData": {"mimeType": source.get("media_type"), "data": source.get("data")}}
    if kind in ("image", "document") and source.get("type") == "url":
        ending = as_text(source.get("url")).partition("?")[0].rpartition(".")[2].lower()
        default = "application/pdf" if kind == "document" else "image/" + (ending if ending in ("png", "gif", "webp") else "jpeg")
        return {"fileData": {"mimeType": source.get("media_type") or default, "fileUri": source.get("url")}}
    text = block_text(block)
    return {"text": text} if text else {}


def gemini_response(block: dict, name: str, generation: tuple) -> tuple:
    """(functionResponse part, parts that must follow it) of a tool_result. Before Gemini 3 images cannot be inside."""
    parts = [part for part in map(gemini_part, blocks_of(block)) if part]
    words = "\n".join(part["text"] for part in parts if "text" in part)
    response = {"name": name, "response": {"error" if block.get("is_error") else "output": words}}
    inside = [part for part in parts if "inlineData" in part] if generation >= (3, 0) else []
    if generation >= (3, 0):
        response = {"id": block["tool_use_id"], **response, **({"parts": inside} if inside else {})}
    return {"functionResponse": response}, [part for part in parts if "text" not in part and part not in inside]


def gemini_config(request: dict, generation: tuple, has_functions: bool) -> dict:
    """generationConfig. More output than the model has is an error on Vertex: capped. Five stop sequences are the most."""
    most, schema = 65535 if generation >= (2, 5) else 8192, output_format(request).get("schema")
    config = {there: request[name] for name, there in GEMINI_FIELDS.items() if request.get(name) not in (None, [])}
    if "maxOutputTokens" in config:
        config["maxOutputTokens"] = min(config["maxOutputTokens"], most)
    if "stopSequences" in config:
        config["stopSequences"] = config["stopSequences"][:5]
    if generation >= (2, 5):
        config["thinkingConfig"] = gemini_thinking(request, generation)
    if (schema or wants_json(request)) and (generation >= (3, 0) or not has_functions):    # Gemini 2 refuses both
        config["responseMimeType"] = "application/json"
        config["responseJsonSchema"] = schema and gemini_schema(schema, "output_config.format.schema")
    return {key: value for key, value in config.items() if value not in ({}, None)}


GEMINI_FIELDS = {"max_tokens": "maxOutputTokens", "temperature": "temperature", "top_p": "topP", "top_k": "topK",
                 "stop_sequences": "stopSequences"}


def gemini_thinking(request: dict, generation: tuple) -> dict:
    """thinkingConfig: a level since Gemini 3, a budget in 2.5; {} leaves it to the model."""
    thinking, model = as_dict(request.get("thinking")), as_text(request.get("model")).lower()
    kind = thinking.get("type")
    level, budget = GEMINI_EFFORTS.get(effort_of(request), (None, -1 if kind == "adaptive" else None))
    if generation >= (3, 0):
        if kind == "disabled":
            level = "minimal" if re.search(r"gemini-3(\.[0-6])?-flash", model) else "low"    # no Pro can stop, nor later Flash
        level = "high" if level == "medium" and "gemini-3-pro" in model else level    # the one that has only two
        config = {"thinkingLevel": level} if level else {}
    else:
        least, most, off = next(limits for name, *limits in GEMINI_BUDGETS if name in model)
        budget = thinking["budget_tokens"] if type(thinking.get("budget_tokens")) is int else budget
        budget = off if kind == "disabled" else budget if budget in (None, -1) else min(max(budget, least), most)
        config = {} if budget is None else {"thinkingBudget": budget}
    return {**config, **({"includeThoughts": True} if kind in ("enabled", "adaptive") else {})}


def gemini_tools(request: dict, functions: list) -> dict:
    """tools and toolConfig. Google's search only where nothing else is offered: the two together are refused by most models."""
    if not functions:
        return {"tools": [{"googleSearch": {}}]} if any(map(is_web_search, request.get("tools") or [])) else {}
    declarations = [{"name": tool["name"], **({"description": tool["description"]} if tool.get("description") else {}),
                     "parametersJsonSchema": gemini_schema(tool["input_schema"], "the schema of " + tool["name"])}
                    for tool in functions]
    tools, choice = {"tools": [{"functionDeclarations": declarations}]}, as_dict(request.get("tool_choice"))
    config = {"mode": {"any": "ANY", "tool": "ANY", "none": "NONE"}.get(as_text(choice.get("type")))}
    if choice.get("type") == "tool":
        config["allowedFunctionNames"] = [tool["name"] for tool in functions if tool["name"] == choice.get("name")]
    is_told = config["mode"] and config.get("allowedFunctionNames") != []    # a choice of a tool that was left out goes with it
    return {**tools, "toolConfig": {"functionCallingConfig": config}} if is_told else tools


# Schemas. parametersJsonSchema and responseJsonSchema take JSON Schema, so that maps, tuples, lists of types and empty objects
# stay what they are; `parameters` (OpenAPI 3.0) refuses them. But only a documented subset is understood, and a $ref beside
# anything else or within $defs is an error: what is given is that subset without references. Keywords are told by their place: a
# property may be called "format" or "not".
SCHEMA_WORDS = ("title", "description", "enum", "default", "minimum", "maximum", "minItems", "maxItems", "minLength", "maxLength",
                "pattern")
SCHEMA_FORMATS = ("date-time", "enum", "float", "double", "int32", "int64")    # Google refuses other formats of strings
MAX_SCHEMA_NODES, MAX_SCHEMA_REFS = 3000, 32    # references that lead to each other may multiply


def gemini_schema(schema: dict, what: str) -> dict:
    """The schema in the words that Gemini understands, wider than the original where they fail; the root is an object."""
    try:
        return {"type": "object", **SchemaCleaner(schema).clean(schema)}
    except RecursionError:
        raise ApiError(400, "%s is nested too deeply" % what)


class SchemaCleaner:
    def __init__(self, root):
        self.root, self.left = root, MAX_SCHEMA_NODES

    def clean(self, node, refs=()) -> dict:
        """One subschema; true, false and what is too much become {}, anything. refs: the references that led here."""
        self.left -= 1
        if not isinstance(node, dict) or self.left < 0:
            return {}
        node, refs = self.flat(node, refs)
        out = {word: node[word] for word in SCHEMA_WORDS if word in node}
        if node.get("format") in SCHEMA_FORMATS:
            out["format"] = node["format"]
        if "const" in node:
            out["enum"] = [node["const"]]
        for word, near, step in (("exclusiveMinimum", "minimum", 1), ("exclusiveMaximum", "maximum", -1)):
            if type(node.get(word)) in (int, float):
                out.setdefault(near, node[word] + step if node.get("type") == "integer" else node[word])
        if isinstance(node.get("properties"), dict):
            out["properties"] = {name: self.clean(value, refs) for name, value in node["properties"].items()}
            out["required"] = [name for name in strings_in(node.get("required")) if name in out["properties"]]
        for word in ("items", "additionalProperties"):
            if isinstance(node.get(word), dict):
                out[word] = self.clean(node[word], refs)
        row = node.get("prefixItems") or node.get("items")
        out["prefixItems"] = [self.clean(value, refs) for value in row] if isinstance(row, list) else []
        out["anyOf"] = [self.clean(value, refs) for word in ("anyOf", "oneOf") for value in dicts_in(node.get(word))]
        types = [name.lower() for name in strings_in(node.get("type"))] or ["object"] * ("properties" in out)
        types += ["null"] * (types != [] and node.get("nullable") is True)
        out["type"] = types if len(types) > 1 else "".join(types)
        return {word: value for word, value in out.items() if word in SCHEMA_WORDS or value or word == "properties"}

    def flat(self, node: dict, refs: tuple) -> tuple:
        """The node with its $ref and allOf written out, and the references so far; one that leads back is any object."""
        parts, ref = [(part, refs) for part in dicts_in(node.get("allOf"))], node.get("$ref")
        if isinstance(ref, str):
            target = pointed(self.root, ref) if ref not in refs and len(refs) < MAX_SCHEMA_REFS else None
            parts.append((target, refs + (ref,)) if isinstance(target, dict) else ({"type": "object"}, refs))
        node = {word: value for word, value in node.items() if word not in ("allOf", "$ref")}
        for part, path in parts:
            part, path = self.flat(part, path)
            properties = {**as_dict(part.get("properties")), **as_dict(node.get("properties"))}
            required = strings_in(node.get("required")) + strings_in(part.get("required"))
            node = {**part, **node, **({"properties": properties, "required": required} if properties else {})}
            refs = tuple({*refs, *path})
        return node, refs


def strings_in(value) -> list:
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)]


def pointed(root, ref: str):
    """What a local reference points at, None if nothing."""
    for step in filter(None, ref[1:].split("/")):
        step = step.replace("~1", "/").replace("~0", "~")
        root = {str(n): item for n, item in enumerate(root)} if isinstance(root, list) else root
        root = as_dict(root).get(step)
    return root if ref[:1] == "#" else None


# a client's request

GEMINI_BODY = {"contents": "a list", "systemInstruction": "an object?", "tools": "a list?", "toolConfig": "an object?",
               "generationConfig": "an object?"}


def gemini_parse_request(body) -> dict:
    """The request that a generateContent body asks for. Model and streaming are told by its URL."""
    expect_fields(expect(body, "an object", "the body"), GEMINI_BODY)
    config = body.get("generationConfig") or {}
    expect_fields(config, {there: ANTHROPIC_FIELDS[name] for name, there in GEMINI_FIELDS.items()}, "generationConfig.")
    for n, text in enumerate(config.get("stopSequences") or []):
        expect(text, "a string", "generationConfig.stopSequences.%d" % n)
    thinking, output = gemini_parse_thinking(as_dict(config.get("thinkingConfig")))
    schema, extra = config.get("responseJsonSchema") or config.get("responseSchema"), {}
    if schema:
        output["format"] = {"type": "json_schema", "schema": gemini_schema(schema, "generationConfig.responseSchema")}
    elif config.get("responseMimeType") == "application/json":
        extra["response_format"] = {"type": "json_object"}
    system = gemini_parse_content(body.get("systemInstruction") or {"parts": []}, "systemInstruction", {})
    request = {**{name: config.get(there) for name, there in GEMINI_FIELDS.items()}, "system": system,
               "messages": gemini_parse_contents(body["contents"]), "thinking": thinking, "output_config": output,
               "x-openai": extra, **gemini_parse_tools(body)}
    return {key: value for key, value in request.items() if value not in (None, [], {})}


def gemini_parse_contents(contents: list) -> list:
    """The messages; neighbours of one role are one."""
    messages, calls = [], {}
    for n, content in enumerate(contents):
        blocks = gemini_parse_content(content, "contents.%d" % n, calls)
        role = "assistant" if content.get("role") == "model" else "user"
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += blocks
        elif blocks:
            messages.append({"role": role, "content": blocks})
    if not messages:
        raise ApiError(400, "contents: at least one part is required")
    return messages


def gemini_parse_content(content, path: str, calls: dict) -> list:
    """Its blocks. calls: {id: name} of the calls that wait for a response."""
    blocks = []
    for n, part in enumerate(expect(expect(content, "an object", path).get("parts"), "a list", path + ".parts")):
        place = "%s.parts.%d" % (path, n)
        kind = next((kind for kind in GEMINI_PARTS if expect(part, "an object", place).get(kind)), None)
        if kind:
            fields, parse = GEMINI_PARTS[kind]
            place += "." + kind
            expect_fields(expect(part[kind], "an object", place), fields, place + ".")
            blocks += parse(part, place, calls)
            continue
        text = expect(part.get("text", "[%s: a part that was left out]" % ", ".join(part)), "a string", place + ".text")
        thought = {"type": "thinking", "thinking": text, "signature": ""}
        blocks += [thought if part.get("thought") else {"type": "text", "text": text}] if text else []
    return blocks


def gemini_parse_call(part: dict, path: str, calls: dict) -> list:
    call, signature = part["functionCall"], as_text(part.get("thoughtSignature"))
    id = call.get("id") or new_id("toolu_")
    calls[id] = call["name"]
    thought = {"type": "thinking", "thinking": "", "signature": GEMINI_SIGNATURE + signature}
    return [thought] * (signature not in ("", NO_SIGNATURE)) + [
        {"type": "tool_use", "id": id, "name": call["name"], "input": call.get("args") or {}}]


def gemini_parse_response(part: dict, path: str, calls: dict) -> list:
    """A response without id answers the oldest call of its name. What it says has no fixed shape; these three are usual."""
    response = part["functionResponse"]
    id = response.get("id") or next((id for id, name in calls.items() if name == response["name"]), "")
    calls.pop(id, None)
    told = response.get("response") or {}
    words = next(iter(told.values())) if list(told) in (["output"], ["error"], ["result"]) else told or ""
    words = words if isinstance(words, str) else json.dumps(words, ensure_ascii=False)
    media = gemini_parse_content(response, path, {}) if response.get("parts") else []
    content = [{"type": "text", "text": words}] * bool(words) + media if media else words
    return [{"type": "tool_result", "tool_use_id": id, "content": content, **({"is_error": True} if "error" in told else {})}]


def gemini_parse_media(part: dict, path: str, calls: dict) -> list:
    media = part.get("inlineData") or part["fileData"]
    source = {"type": "url", "url": media.get("fileUri")}
    if "data" in media:
        source = {"type": "base64", "media_type": media["mimeType"], "data": media["data"]}
    return [{"type": "image" if as_text(media.get("mimeType")).startswith("image/") else "document", "source": source}]


GEMINI_PARTS = {    # what is in a part -> its members, and what makes blocks of it
    "functionCall": ({"name": "a string", "id": "a string?", "args": "an object?"}, gemini_parse_call),
    "functionResponse": ({"name": "a string", "id": "a string?", "response": "an object?"}, gemini_parse_response),
    "inlineData": ({"mimeType": "a string", "data": "a string"}, gemini_parse_media),
    "fileData": ({"fileUri": "a string", "mimeType": "a string?"}, gemini_parse_media),
}


def gemini_parse_thinking(config: dict) -> tuple:
    """(thinking, output_config) that a thinkingConfig asks for."""
    budget, level = config.get("thinkingBudget"), as_text(config.get("thinkingLevel")).lower()
    if type(budget) is int and budget >= 0:
        return {"type": "enabled", "budget_tokens": budget} if budget else {"type": "disabled"}, {}
    level = "low" if level == "minimal" else level
    return {"type": "adaptive"} if config.get("includeThoughts") or budget == -1 else {}, {"effort": level} if level else {}


def gemini_parse_tools(body: dict) -> dict:
    """tools and tool_choice. `parameters` write types in capitals, as OpenAPI: gemini_schema makes JSON Schema of it."""
    tools, groups = [], dicts_in(body.get("tools"))
    for tool in [tool for group in groups for tool in dicts_in(group.get("functionDeclarations"))]:
        expect_fields(tool, {"name": "a string", "description": "a string?"}, "tools.functionDeclarations.")
        schema = tool.get("parametersJsonSchema") or tool.get("parameters") or {}
        tools.append({"name": tool["name"], **({"description": tool["description"]} if tool.get("description") else {}),
                      "input_schema": gemini_schema(schema, "the schema of " + tool["name"])})
    tools += [{"type": "web_search_20250305", "name": "web_search"} for group in groups if "googleSearch" in group]
    config = as_dict(as_dict(body.get("toolConfig")).get("functionCallingConfig"))
    kind, names = as_text(config.get("mode")).lower(), strings_in(config.get("allowedFunctionNames"))
    choice = {"type": "tool", "name": names[0]} if kind == "any" and len(names) == 1 else {"type": kind}
    return {"tools": tools, "tool_choice": choice if kind in ("auto", "any", "none") else None}


# a provider's reply

def gemini_parse_message(body) -> dict:
    """The message of a whole reply, or of a stream that was sent as one JSON list."""
    chunks = list(map(as_dict, body if isinstance(body, list) else [body]))
    model = as_text(chunks[0].get("modelVersion")) if chunks else ""
    return fold(gemini_told(chunks, BlockWriter(new_id("msg_"), model), is_whole=True))


def gemini_parse_stream(frames, writer):
    values = (parse_json(frame, "a frame of the provider's stream") for frame in frames if frame != b"[DONE]")
    return gemini_told((as_dict(item) for value in values for item in (value if isinstance(value, list) else [value])), writer)


def gemini_told(chunks, writer, is_whole=False):
    """The events of a reply; ApiError if it is cut or no answer."""
    usage, links, queries, end = {}, {}, {}, {}    # end: how it ended, and what Google says of that
    for chunk in chunks:
        if chunk.get("error"):
            raise error_in(chunk)
        usage.update(as_dict(chunk.get("usageMetadata")))
        feedback, candidate = as_dict(chunk.get("promptFeedback")), next(iter(dicts_in(chunk.get("candidates"))), {})
        for part in dicts_in(as_dict(candidate.get("content")).get("parts")):
            yield from gemini_told_part(part, writer)
        if feedback or "finishReason" in candidate:
            words = as_text(feedback.get("blockReasonMessage")) or as_text(candidate.get("finishMessage"))
            told = {"blocked": feedback.get("blockReason"), "finish": as_text(candidate.get("finishReason")),
                    "words": words or blocked_by(feedback) or blocked_by(candidate)}
            end.update({key: value for key, value in told.items() if value})
        grounding = as_dict(candidate.get("groundingMetadata"))
        queries.update(dict.fromkeys(filter(None, strings_in(grounding.get("webSearchQueries")))))
        for page in [as_dict(found.get("web")) for found in dicts_in(grounding.get("groundingChunks"))]:
            url, names = as_text(page.get("uri")), (as_text(page.get("title")), as_text(page.get("domain")))
            links.setdefault(url, next(filter(None, names), url))
    finish = end.get("finish") or is_whole and writer.has_content and "STOP"
    check_gemini_end(finish, end.get("blocked"), ": " + end["words"] if "words" in end else "", writer.has_content)
    links.pop("", None)
    for block in search_blocks(links, "; ".join(queries)) if links else []:
        yield from writer.block(block)
    yield from writer.finish(GEMINI_FINISHES.get(finish), gemini_usage(usage, len(queries) or int(bool(links))))


def gemini_told_part(part: dict, writer):
    """A thoughtSignature goes into a thinking block before its call: clients give both it and its place back verbatim, while
    ids end in file names and meet the limits of other providers. Gemini signs the first of parallel calls only."""
    call, text, signature = part.get("functionCall"), part.get("text"), as_text(part.get("thoughtSignature"))
    if isinstance(call, dict):
        id, args = as_text(call.get("id")), call.get("args")
        yield from writer.signature(GEMINI_SIGNATURE + signature if signature else None)
        yield from writer.tool(len(writer.calls), id if GEMINI_ID.match(id) else None, as_text(call.get("name")),
                               args if isinstance(args, str) else json.dumps(args or {}))
    elif text:
        yield from writer.thinking(as_text(text)) if part.get("thought") else writer.text(as_text(text))
    elif text is None and not signature:
        yield from writer.text("[%s: this cannot be shown here]" % ", ".join(part))


def check_gemini_end(finish, blocked, words, has_content) -> None:
    """ApiError if a reply that ended so is none."""
    if not finish and blocked:
        raise ApiError(400, "Gemini blocked the prompt (%s)%s" % (blocked, words))
    if not finish:
        raise ApiError(502, "the provider's reply ended too early: no finishReason came")
    if finish in GEMINI_FAILURES or not (has_content or finish in ("STOP", "MAX_TOKENS")):
        raise ApiError(400 if finish in GEMINI_FINISHES else 502,
                       "%s (%s)%s" % (GEMINI_FAILURES.get(finish, "Gemini gave no answer"), finish, words))


def blocked_by(value: dict) -> str:
    """The categories for which Google's filter stopped something."""
    return ", ".join(as_text(rating.get("category")) for rating in dicts_in(value.get("safetyRatings")) if rating.get("blocked"))


def gemini_usage(usage: dict, searches=0) -> dict:
    """Usage in the pivot. promptTokenCount includes cached tokens, candidatesTokenCount no thoughts."""
    count = collections.Counter({key: value for key, value in usage.items() if type(value) is int and value > 0})
    return told_usage(count["promptTokenCount"] + count["toolUsePromptTokenCount"], count["cachedContentTokenCount"], 0,
                      count["candidatesTokenCount"] + count["thoughtsTokenCount"], searches)


# a reply to a client

def gemini_render_message(message, request) -> dict:
    chunks = list(gemini_reply_chunks(unfold(message)))
    parts = [part for chunk in chunks for part in chunk["candidates"][0]["content"]["parts"]]
    candidate = {**chunks[-1]["candidates"][0], "content": {"role": "model", "parts": parts}}
    return {**chunks[-1], "candidates": [candidate]}


def gemini_reply_chunks(events):
    """The chunks of a reply: text as it comes, other blocks when they are whole, a call with the signature told before it."""
    message, thoughts = {}, []
    for event in events:
        kind, delta, parts, finish, counts = event["type"], event.get("delta") or {}, [], {}, {}
        if kind == "message_start":
            message = event["message"]
        elif kind == "content_block_start":
            block, partial = dict(event["content_block"]), []
        elif kind == "content_block_delta":
            fold_delta(block, delta, partial)
            text, mark = delta.get("text") or delta.get("thinking"), {"thought": True} if "thinking" in delta else {}
            parts = [{"text": text, **mark}] if text else []
        elif kind == "content_block_stop":
            seal_block(block, partial)
            parts = gemini_parts([*thoughts, block], True) if block["type"] not in ("text", "thinking") else []
            thoughts = [block] if block["type"] == "thinking" else []
        elif kind == "message_delta":
            finish = {"finishReason": GEMINI_REASONS.get(delta.get("stop_reason"), "STOP")}
            counts = {"usageMetadata": gemini_counts(merge_usage(message.get("usage"), event.get("usage")))}
        if parts or finish:
            yield {"candidates": [{"content": {"role": "model", "parts": parts}, **finish, "index": 0}], **counts,
                   "modelVersion": message.get("model"), "responseId": message.get("id")}


GEMINI_REASONS = {"max_tokens": "MAX_TOKENS", "model_context_window_exceeded": "MAX_TOKENS", "refusal": "SAFETY"}


def gemini_counts(usage: dict) -> dict:
    """usageMetadata; like a Responses client's, its prompt count includes what was cached."""
    counts = responses_usage(usage)
    return {"promptTokenCount": counts["input_tokens"], "candidatesTokenCount": counts["output_tokens"],
            "cachedContentTokenCount": counts["input_tokens_details"]["cached_tokens"], "totalTokenCount": counts["total_tokens"]}


def gemini_error(error) -> dict:
    return {"error": {"code": error.status, "message": error.message, "status": GOOGLE_STATUSES.get(error.status, "INTERNAL")}}


GOOGLE_STATUSES = {400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "NOT_FOUND",
                   429: "RESOURCE_EXHAUSTED", 503: "UNAVAILABLE", 504: "DEADLINE_EXCEEDED", 529: "UNAVAILABLE"}


# addresses and keys

def gemini_endpoint(url, model, stream) -> str:
    """From .../v1beta/models/, .../v1beta, a bare host, a full endpoint, or a Vertex address with its project."""
    address, query = split_url(url)
    if "/projects/" in address:
        return vertex_endpoint(url, "google", model, stream)
    address = re.sub(r"/openai(/chat/completions)?$", "", re.sub(r"/models/.*$", "/models", address))
    if not address.endswith("/models"):
        address += "/models" if re.search(r"/v\d\w*$", address) else "/v1beta/models"
    return address + google_method(GOOGLE_METHODS["google"], re.sub(r"^models/", "", model), stream, query)


GOOGLE_METHODS = {"google": ("generateContent", "streamGenerateContent"), "anthropic": ("rawPredict", "streamRawPredict")}


def google_method(methods: tuple, model: str, stream, query: str) -> str:
    from urllib.parse import quote
    query = "?alt=sse" + query.replace("?", "&") if stream and methods[1] == "streamGenerateContent" else query
    return "/%s:%s%s" % (quote(model, safe="@", errors="replace"), methods[bool(stream)], query)


def vertex_endpoint(url, publisher: str, model: str, stream) -> str:
    """The address of a publisher's model; ApiError(400) says what api_base_url must tell."""
    address, query = split_url(url)
    found = re.match(r"(https?://[^/]+)(/.*)?(/projects/[^/]+/locations/[^/]+)", address)
    if not found:
        raise ApiError(400, 'api_base_url of a Vertex provider must tell project and location: write '
                            '"https://LOCATION-aiplatform.googleapis.com/v1/projects/PROJECT/locations/LOCATION", '
                            'or "https://aiplatform.googleapis.com/v1/projects/PROJECT/locations/global", not "%s"' % url)
    place = found.group(1) + (found.group(2) or "/v1") + found.group(3)
    return "%s/publishers/%s/models%s" % (place, publisher, google_method(GOOGLE_METHODS[publisher], model, stream, query))


def gemini_auth(key) -> dict:
    """An API key has its own header; an access token (ya29...) is a bearer's."""
    return bearer(key) if not key or key.startswith("ya29.") else {"x-goog-api-key": key}


def vertex_claude_request(request: dict) -> dict:
    """Anthropic's body with the version in it and without the model, which the URL tells. No anthropic-beta goes there, so what
    needs one is left out as well."""
    thinking = {key: value for key, value in as_dict(request.get("thinking")).items() if key != "display"}
    request = {**request, "messages": without_system_roles(request["messages"]), **({"thinking": thinking} if thinking else {})}
    return {"anthropic_version": "vertex-2023-10-16", **{key: value for key, value in ANTHROPIC.render_request(request).items()
                                                         if key not in ("model", "safeguards", "context_management", "betas")}}


GEMINI = Format("gemini", gemini_parse_request, gemini_render_request, gemini_parse_message, gemini_render_message,
                gemini_parse_stream, lambda events, request: map(encode_data, gemini_reply_chunks(events)),
                gemini_endpoint, gemini_auth,
                render_error=gemini_error, stream_error=lambda error: encode_data(gemini_error(error)))
VERTEX_GEMINI = GEMINI._replace(name="vertex-gemini", auth=bearer,
                                endpoint=lambda url, model, stream: vertex_endpoint(url, "google", model, stream))
VERTEX_CLAUDE = ANTHROPIC._replace(name="vertex-claude", auth=bearer, render_request=vertex_claude_request,
                                   endpoint=lambda url, model, stream: vertex_endpoint(url, "anthropic", model, stream))


# --- The tables

FORMATS = {format.name: format for format in (ANTHROPIC, OPENAI, RESPONSES, GEMINI, VERTEX_GEMINI, VERTEX_CLAUDE)}

# what a request needs, and whether anthropic, openai, responses, gemini carry it unchanged; else what becomes of it
CARRIES = (
    ("system prompt", "yes", "yes", "yes", "yes"),
    ("system messages in their place", "yes", "yes", "yes", "as text of the user"),
    ("images, as data or by address", "yes", "yes", "yes", "yes"),
    ("PDF documents", "yes", "a note, or a file where the host takes it", "yes", "yes"),
    ("tools, calls and results", "yes", "yes", "yes", "yes"),
    ("parallel calls beside text", "yes", "yes", "yes", "yes"),
    ("images in results", "yes", "after the results", "yes", "yes"),
    ("failed results", "yes", "yes", "yes", "yes"),
    ("unsigned thinking of earlier turns", "left out", "yes", "left out", "left out"),
    ("tool_choice any, tool, none", "yes", "yes", "yes", "yes"),
    ("no parallel calls", "yes", "yes", "yes", "left out"),
    ("temperature, top_p", "yes", "yes", "yes", "yes"),
    ("top_k", "yes", "left out", "left out", "yes"),
    ("stop sequences", "yes", "yes", "left out", "yes"),
    ("effort", "yes", "yes", "yes", "yes"),
    ("structured output", "yes", "yes", "yes", "its schema in the words that Gemini takes"),
    ("cache markers", "yes", "for Claude models at OpenRouter", "left out", "left out"),
    ("metadata.user_id", "yes", "left out", "left out", "left out"),
)


# === 6. Transformers ================================================================

TRANSFORMERS = {}    # lower-case name -> class
HOOKS = ("request", "body", "events", "headers")


def transformer(*names):
    """Registers a class under these names, in any case; the first is its own."""
    def register(cls):
        cls.name = names[0]
        TRANSFORMERS.update({name.lower(): cls for name in names})
        return cls
    return register


def known_transformers() -> tuple:
    """The names that a config's "use" may hold."""
    return tuple(cls.name for cls in TRANSFORMERS.values())


class Transformer:
    """A quirk of a provider or model: each hook returns what it was given, or a changed copy. The base changes nothing.

    One object serves one turn: a hook may keep in self what a later hook needs. self.options: what the config gave; self.model:
    the provider's name of the model; self.provider: the Provider. Your own is a plain class ("transformers": [{"path": "x"}]):

        class Shout:
            name = "shout"                          # "use": ["shout"] or "use": [["shout", {"mark": "!"}]]
            def __init__(self, options, model):
                self.mark = options.get("mark", "!")
            def request(self, request):             # as Anthropic Messages, before it is translated
                return {**request, "system": "SHOUT" + self.mark}
            def body(self, body, request):          # as the provider gets it
                return {**body, "temperature": 1}
            def events(self, events):               # the reply, as Anthropic's stream events
                yield from events
    """
    name = about = ""
    options = {}                 # of the class: option -> (type, what it does); of an object: option -> value
    touches_messages = True      # request() or body() may look at or change messages, not only top-level fields
    needs_pivot = True           # request() does what body() does not do again
    provider = None
    is_own = False               # the owner's code, not ours

    def __init__(self, options: dict, model: str):
        self.options, self.model = options, model

    def request(self, request: dict) -> dict:
        """The request in Anthropic's shape."""
        return request

    def body(self, body: dict, request: dict) -> dict:
        """The body in the provider's own format, made of `request`."""
        return body

    def events(self, events):
        """The reply's events, as any iterator. A Spliced is passed on as it is."""
        return events

    def headers(self, headers: dict) -> dict:
        """The headers for the provider, without its key."""
        return headers


class Chain:
    """The transformers of one turn, in order on the way up, exactly reversed on the way down. custom: {name: class}."""

    def __init__(self, provider, model: str, custom=()):
        classes = {**TRANSFORMERS, **dict(custom)}
        links = [new_link(classes[name.lower()], options, provider, model)
                 for name, options in chosen_transformers(provider, model) if name.lower() in classes]
        self.hooks = {hook: [link for link in links if getattr(type(link), hook) is not getattr(Transformer, hook)]
                      for hook in HOOKS}
        self.names = tuple(link.name for link in links)
        self.sees_events = bool(self.hooks["events"])
        self.sees_requests = any(link.touches_messages for link in self.hooks["request"] + self.hooks["body"])
        self.needs_pivot = self.sees_events or any(link.needs_pivot for link in self.hooks["request"])

    def request(self, request: dict) -> dict:
        return self.run("request", request)

    def body(self, body: dict, request: dict) -> dict:
        return self.run("body", body, request)

    def headers(self, headers: dict) -> dict:
        return self.run("headers", headers)

    def events(self, events):
        for link in reversed(self.hooks["events"]):
            events = guarded_events(link, events)
        return events

    def run(self, hook, value, *more):
        for link in self.hooks[hook]:
            try:
                if link.is_own:    # it may change what it is given, and the next turn has the same messages and tools
                    value = json.loads(json.dumps(value))
                value = getattr(link, hook)(value, *more)
            except Exception as e:
                raise hook_error(link, hook, e)
            if not isinstance(value, dict):
                raise ApiError(500, "transformer %s: %s must return an object, not %s" % (link.name, hook, type(value).__name__))
        return value


def new_link(cls, options, provider, model):
    try:
        link = cls({**getattr(cls, "defaults", {}), **options}, model)
    except Exception as e:
        raise hook_error(cls, "__init__", e)
    link.provider = provider
    return link


def guarded_events(link, events):
    try:
        yield from link.events(events)
    except Exception as e:
        raise hook_error(link, "events", e)


def hook_error(link, hook, e) -> ApiError:
    """What an owner's own code may raise, in words."""
    words = "transformer %s failed in %s: %s: %s" % (link.name, hook, type(e).__name__, e)
    return e if isinstance(e, ApiError) else ApiError(500, words)


def chosen_transformers(provider, model: str) -> tuple:
    """((name, options), ...) on the way up: defaults, the provider's list, the model's list.

    An empty list turns the defaults off; a listed name takes the place of the default of that name.
    """
    by_model = {name.lower(): use for name, use in provider.model_use.items()}
    lists = [use for use in (provider.use, by_model.get(model.lower())) if use is not None]
    listed = tuple(item for use in lists for item in use)
    names = {name.lower() for name, _ in listed}
    return tuple(item for item in default_transformers(provider, model) if () not in lists and item[0] not in names) + listed


def own_transformers(namespace: dict, options=None, path="the file") -> dict:
    """{lower-case name: class} of the transformers in a module's globals: its classes with a hook, by their `name` or class name.

    options: what the config gives beside the path. ConfigError if there is none.
    """
    found = {}
    for cls in namespace.values():
        is_own = isinstance(cls, type) and cls.__module__ == namespace.get("__name__")
        if is_own and any(callable(getattr(cls, hook, None)) for hook in HOOKS):
            name = getattr(cls, "name", "") or cls.__name__
            own = {"name": name, "defaults": dict(options or {}), "is_own": True}
            found[name.lower()] = type(cls.__name__, (cls, Transformer), own)
    if not found:
        raise ConfigError(["transformers: %s defines no class with a method request, body, events or headers" % path])
    return found


# --- What hosts and models need by default

HOSTS = {    # host (and those below it) or :port -> transformer for its chat completions
    "api.deepseek.com": "deepseek", "openrouter.ai": "openrouter", "ollama.com": "ollama", ":11434": "ollama",
    "api.groq.com": "groq", "generativelanguage.googleapis.com": "gemini", "api.openai.com": "openai",
    "openai.azure.com": "openai", "api.cerebras.ai": "cerebras", "api.mistral.ai": "mistral", "api.moonshot.ai": "moonshot",
    "api.moonshot.cn": "moonshot", "api.z.ai": "zai", "open.bigmodel.cn": "zai",
    "dashscope.aliyuncs.com": "dashscope", "dashscope-intl.aliyuncs.com": "dashscope", "dashscope-us.aliyuncs.com": "dashscope",
    "ai-gateway.vercel.sh": "vercel",
}
OPENAI_REASONS = Pattern(r"(?:^|[/:])(?:gpt-[5-9]|o[1-9])(?![0-9])(?:$|[-.:@\[])")    # these need "openai" whatever the host

UNKNOWN_THERE = ("safeguards", "context_management", "thinking.display", "output_config.format", "betas")
STRICT_THERE = (*UNKNOWN_THERE, "role:system", "tool_reference")
ANTHROPIC_REFUSALS = {    # others' /v1/messages: host or :port -> what without_parameter leaves out or rewrites
    "api.anthropic.com": (), "api.deepseek.com": STRICT_THERE, "api.z.ai": STRICT_THERE, "open.bigmodel.cn": STRICT_THERE,
    "api.moonshot.ai": STRICT_THERE, "api.moonshot.cn": STRICT_THERE, "api.kimi.com": STRICT_THERE,
    "api.minimax.io": STRICT_THERE, "api.minimaxi.com": STRICT_THERE, "aliyuncs.com": STRICT_THERE,
    "ollama.com": UNKNOWN_THERE, ":11434": UNKNOWN_THERE,
    ":8080": STRICT_THERE,    # llama.cpp: templates raise for a system message that is not first
}


def default_transformers(provider, model: str) -> tuple:
    if provider.format in ("anthropic", "vertex-claude"):
        # the billing header changes with every run and ruins other providers' prompt caches
        names = by_host(ANTHROPIC_REFUSALS, provider.url)
        return () if names == () else (("without", {"names": ("billing-header", *(names or ()))}),)
    names = ["openai"] * bool(OPENAI_REASONS.search(model.lower())) + [by_host(HOSTS, provider.url)]
    return tuple((name, {}) for name in dict.fromkeys(names) if name) if provider.format in ("openai", "responses") else ()


def by_host(table: dict, url: str):
    """The table's entry for the URL's host, a domain above it, or its port; None."""
    match = re.match(r"[a-z]+://(?:[^/?#]*@)?(\[[^\]]*\]|[^/?#:]*)(:[0-9]+)?", url.lower())
    labels, port = (match[1].split("."), match[2]) if match else ((), None)
    return next((table[key] for key in [".".join(labels[i:]) for i in range(len(labels))] + [port] if key in table), None)


# --- Fields of requests

def renamed(value: dict, old: str, new: str) -> dict:
    return {new if key == old else key: item for key, item in value.items()} if old in value else value


def capped(value: dict, limit) -> dict:
    """A request or body with each of its output limits at most `limit`; None is no limit."""
    over = {name: limit for name in LIMITS if limit and (value.get(name) or 0) > limit}
    return {**value, **over} if over else value


def thinking_kind(request: dict):
    """"enabled", "disabled" or, where the client says nothing, None."""
    kind = as_dict(request.get("thinking")).get("type")
    return "enabled" if kind == "adaptive" else kind


@transformer("maxtoken")
class MaxToken(Transformer):
    about = "Caps the length of an answer; asks for none where the client asked for none."
    options = {"max_tokens": (int, "the most tokens of one answer")}
    touches_messages = needs_pivot = False

    def request(self, request):
        return capped(request, self.options.get("max_tokens"))

    def body(self, body, request):
        return self.request(body)


@transformer("sampling")
class Sampling(MaxToken):
    about = "Sets sampling parameters, whatever the client asked for, and caps the length."
    options = {**MaxToken.options, "temperature": (float, "0 is the steadiest"), "top_p": (float, "0 to 1"),
               "top_k": (int, "choose among so many tokens"), "repetition_penalty": (float, "1 is none")}

    def request(self, request, names=("temperature", "top_p", "top_k")):
        return {**super().request(request), **{name: self.options[name] for name in names if self.options.get(name) is not None}}

    def body(self, body, request):
        count = {"openai": 4, "responses": 2}.get(self.provider.format, 0)
        return self.request(body, ("temperature", "top_p", "top_k", "repetition_penalty")[:count])


@transformer("reasoning")
class Reasoning(Transformer):
    about = "Tells the provider whether to think, in the fields of Qwen, GLM and vLLM."
    options = {"enable": (bool, "false: never think, whatever the client asks")}
    touches_messages = needs_pivot = False

    def request(self, request):
        is_asked = self.options.get("enable", True)
        return request if is_asked else {**dropped(request, ("output_config", "effort")), "thinking": {"type": "disabled"}}

    def body(self, body, request):
        kind = thinking_kind(self.request(request))
        body = without_keys(body, "reasoning", "reasoning_effort") if kind == "disabled" else body
        if kind is None or self.provider.format != "openai":
            return body
        return {**body, "thinking": {"type": kind}, "enable_thinking": kind == "enabled"}


@transformer("maxcompletiontokens")
class MaxCompletionTokens(Transformer):
    about = "Sends max_tokens as max_completion_tokens."
    touches_messages = False

    def body(self, body, request):
        return renamed(body, "max_tokens", "max_completion_tokens") if self.provider.format == "openai" else body


@transformer("streamoptions")
class StreamOptions(Transformer):
    about = "Asks for usage in streams; ccr does by itself, this also where a default leaves it out."
    touches_messages = False

    def body(self, body, request):
        options = {**as_dict(body.get("stream_options")), "include_usage": True}
        return {**body, "stream_options": options} if body.get("stream") and self.provider.format == "openai" else body


@transformer("customparams")
class CustomParams(Transformer):
    about = "Adds its options to the body. What is there stays; objects are merged, and inside them the options win."
    touches_messages = False

    def body(self, body, request):
        return {**self.options, **body, **{key: merged(value, self.options[key]) for key, value in body.items()
                                           if isinstance(value, dict) and isinstance(self.options.get(key), dict)}}


def merged(old, new):
    """Two JSON values as one: objects key by key, else the new one."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    return {**old, **{key: merged(old.get(key), value) for key, value in new.items()}}


@transformer("cleancache")
class CleanCache(Transformer):
    about = "Removes cache_control from requests."

    def request(self, request):
        for path in ("x-cache", "cache_control", "system.cache_control", "tools.cache_control", "messages.cache_control",
                     "messages.content.cache_control", "messages.content.content.cache_control"):
            request = dropped(request, path.split("."))
        return request


@transformer("without")
class Without(Transformer):
    about = "Leaves out what the provider refuses, by name or path (\"top_p\", \"thinking.display\")."
    options = {"names": (list, "what is left out")}

    def body(self, body, request):
        for name in self.options.get("names", ()):
            body, _ = without_parameter(body, {}, name)
        return body

    def headers(self, headers):
        for name in self.options.get("names", ()):
            _, headers = without_parameter({}, headers, name)
        return headers


# --- Providers of chat completions

EFFORT_LEVELS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


class Host(Transformer):
    """What one provider's chat completions take, as facts; other formats are left alone."""
    history = "reasoning_content"    # what it calls the reasoning of earlier turns; None: it refuses any
    fills_history = False            # while it thinks it demands reasoning on every earlier turn, also another model's
    knows_schema = True              # response_format may be a JSON schema
    levels = None                    # {part of a model's name: reasoning efforts it takes}; None: whatever the renderer says

    def efforts(self, model: str):
        return next((levels for part, levels in (self.levels or {}).items() if part in model), None)

    def switch(self, kind: str, request: dict) -> dict:
        """The members that turn thinking "enabled" or "disabled"."""
        return {}

    def body(self, body, request):
        return self.chat(body, request) if self.provider.format == "openai" else body

    def chat(self, body, request):
        kind = thinking_kind(request)
        if not self.history:
            body = with_messages(body, lambda m: without_keys(m, "reasoning_content"))
        elif self.history != "reasoning_content":
            body = with_messages(body, lambda m: renamed(m, "reasoning_content", self.history))
        elif self.fills_history and kind != "disabled":
            body = with_reasoning(body)
        body = {**with_effort(body, request, self.efforts(self.model.lower())), **(self.switch(kind, request) if kind else {})}
        return body if self.knows_schema else schema_in_words(body, "json_object")


class ThinkingHost(Host):
    """One whose field `thinking` says whether to think, instead of an effort."""
    levels = {"": ()}

    def switch(self, kind, request):
        return {"thinking": {"type": kind}}

    def chat(self, body, request):
        body = super().chat(body, request)
        return without_keys(body, "reasoning_effort") if thinking_kind(request) == "disabled" else body


def with_messages(body: dict, change) -> dict:
    """The body with change(message) for each message; the very body if nothing changed."""
    messages = mapped(change, body["messages"])
    return body if messages is body["messages"] else {**body, "messages": messages}


def with_effort(body: dict, request: dict, levels) -> dict:
    """The body with the effort that the request wants, as near as these levels allow; None: as it is."""
    if levels is None:
        return body
    wanted = "none" if thinking_kind(request) == "disabled" else body.get("reasoning_effort")
    wanted = effort_of(request) or wanted if wanted == "high" else wanted    # where OpenAI's scale ends
    return with_effort_of({**body, "reasoning_effort": wanted} if wanted else body, levels)


def nearest_effort(wanted: str, levels):
    """The highest of the levels that is not above `wanted`, else the lowest; None without any. "none" only for who wants it."""
    known = [level for level in EFFORT_LEVELS if level in levels and (wanted == "none" or level != "none")]
    above = EFFORT_LEVELS[EFFORT_LEVELS.index(wanted) + 1:] if wanted in EFFORT_LEVELS else ()
    return next((level for level in reversed(known) if level not in above), known[0] if known else None)


@transformer("deepseek")
class DeepSeek(ThinkingHost):
    about = "DeepSeek's API: thinking on or off, reasoning on every earlier turn, JSON without a schema. No cap of its own."
    levels = {"": EFFORT_LEVELS[2:]}
    fills_history, knows_schema = True, False

    def chat(self, body, request):    # often listed for other hosts, which need none of it
        return super().chat(body, request) if by_host({"deepseek.com": True}, self.provider.url) else body


@transformer("moonshot")
class Moonshot(ThinkingHost):
    about = "Moonshot's API: thinking on or off (it refuses an effort beside), reasoning on every turn of the history."
    fills_history = True


@transformer("zai")
class Zai(ThinkingHost):
    about = "Z.ai's and BigModel's API: thinking on or off, earlier reasoning kept, JSON without a schema."
    knows_schema = False

    def switch(self, kind, request):
        return {"thinking": {"type": kind, **({"clear_thinking": False} if kind == "enabled" else {})}}


@transformer("dashscope")
class DashScope(ThinkingHost):
    about = "Alibaba's DashScope: enable_thinking and thinking_budget."
    touches_messages = False

    def switch(self, kind, request):
        budget = request["thinking"].get("budget_tokens") if kind == "enabled" else None
        return {"enable_thinking": kind == "enabled", **({"thinking_budget": budget} if budget else {})}


@transformer("ollama")
class Ollama(Host):
    about = "Ollama: earlier reasoning under its own name, and the efforts that it knows."
    history, levels = "reasoning", {"": ("none", "low", "medium", "high", "max")}


@transformer("openrouter")
class OpenRouter(Host):
    about = "OpenRouter: its options go into the body (provider routing), Claude's cache markers stay, reasoning in its own form."
    options = {"provider": (dict, "routing: {\"only\": [\"name\"]} or {\"order\": [...], \"allow_fallbacks\": false}"),
               "models": (list, "OpenRouter's own fallback models"), "transforms": (list, "OpenRouter's transforms"),
               "plugins": (list, "OpenRouter's plugins")}
    history, levels = "reasoning", {"": EFFORT_LEVELS[:-1]}
    needs_pivot, takes_files = False, True

    def is_model(self, name):
        return name in self.model.lower()

    def request(self, request):
        return {**request, "x-files": self.takes_files, "x-details": self.is_model("gemini"), "x-cache": self.is_model("claude")}

    def switch(self, kind, request):
        budget, effort = request["thinking"].get("budget_tokens"), as_dict(request.get("output_config")).get("effort")
        return {"reasoning": {"max_tokens": budget} if budget and not effort else {"enabled": kind == "enabled"}}

    def chat(self, body, request):
        body = super().chat(body, request)
        effort = body.get("reasoning_effort")
        if effort and "max_tokens" not in as_dict(body.get("reasoning")):
            body = {**body, "reasoning": {"effort": effort} if effort != "none" else {"enabled": False}}
        body = with_messages(body, with_stand_in) if self.is_model("gemini") else body
        return {**without_keys(body, "reasoning_effort"), **self.options}


def with_stand_in(message: dict) -> dict:
    """A message whose calls another model made, as Gemini takes it there."""
    calls = message.get("tool_calls")
    if not calls or message.get("reasoning_details"):
        return message
    return {**message, "reasoning_details": [{"type": "reasoning.encrypted", "data": NO_SIGNATURE, "id": calls[0].get("id"),
                                              "format": "google-gemini-v1", "index": 0}]}


@transformer("vercel")
class Vercel(OpenRouter):
    about = "Vercel's AI gateway: its options go into the body, Claude's cache markers stay, reasoning in its own form."
    options = {"providerOptions": (dict, "routing: {\"gateway\": {\"only\": [\"name\"]}}")}
    takes_files = False    # it has a form of its own for them


@transformer("groq")
class Groq(Host):
    about = "Groq: no earlier reasoning, no $schema in tools, and the efforts that its models know."
    history, levels = None, {"gpt-oss": ("low", "medium", "high"), "qwen": ("none",), "": ()}

    def chat(self, body, request):
        return dropped(super().chat(body, request), ("tools", "function", "parameters", "$schema"))


@transformer("cerebras")
class Cerebras(Host):
    about = "Cerebras: earlier reasoning under its own name, disable_reasoning for GLM, and the efforts that its models know."
    history, levels = "reasoning", {"glm": (), "": ("low", "medium", "high")}

    def switch(self, kind, request):
        return {"disable_reasoning": kind == "disabled"} if "glm" in self.model.lower() else {}


@transformer("mistral")
class Mistral(Host):
    about = "Mistral: no earlier reasoning, tool ids of nine letters and digits, its order of roles, no stream_options."
    history = None

    def chat(self, body, request):
        body = without_keys(super().chat(body, request), "stream_options")    # its streams carry usage unasked
        return {**body, "messages": in_turn(map(short_ids, body["messages"]), ("user", "tool"))}


def short_ids(message: dict) -> dict:
    """The message with tool ids as Mistral demands them; the same id always gives the same."""
    import hashlib

    def short(id):
        return hashlib.sha1(str(id).encode("utf-8", "replace")).hexdigest()[:9]
    if message.get("tool_calls"):
        return {**message, "tool_calls": [{**call, "id": short(call.get("id"))} for call in message["tool_calls"]]}
    return {**message, "tool_call_id": short(message["tool_call_id"])} if "tool_call_id" in message else message


def in_turn(messages, joinable=("user",)) -> list:
    """Chat messages in which the system speaks first or not at all, later through the user, and no words of the user follow those
    of a role in `joinable`: they join them, or where not all is text an assistant's word stands in between."""
    found, systems = [], ("system", "developer")
    for message in messages:
        before = found[-1] if found else {"role": "system"}
        if message["role"] in systems and before["role"] not in systems:
            message, = without_system_roles([{**message, "role": "system"}])
        if message["role"] != "user" or before["role"] not in joinable:
            found.append(message)
        elif before["role"] == "user" or all(part.get("type") == "text" for part in blocks_of(message) + blocks_of(before)):
            found[-1] = {**before, "content": joined_content(before["content"], message["content"])}
        else:
            found += [{"role": "assistant", "content": "OK."}, message]
    return found


@transformer("gemini")
class Gemini(Host):
    about = "Google's Gemini API, as a format. On its OpenAI-compatible address: a stand-in for thought signatures."
    history, levels = None, {"": EFFORT_LEVELS[:5]}

    def chat(self, body, request):
        def signed(message):
            stand_in = {"extra_content": {"google": {"thought_signature": NO_SIGNATURE}}}
            calls = [{**stand_in, **call} for call in message.get("tool_calls") or ()]
            return {**message, "tool_calls": calls} if calls else message
        return with_messages(super().chat(body, request), signed)


@transformer("openai")
class OpenAI(Host):
    about = "OpenAI's API: no earlier reasoning; gpt-5 and later, o1, o3, o4: max_completion_tokens, no sampling parameters."
    history = None
    FIXED = ("temperature", "top_p", "top_k", "presence_penalty", "frequency_penalty", "logprobs", "top_logprobs", "logit_bias",
             "stop")

    levels = {"gpt-5.1-codex-max": EFFORT_LEVELS[:6], "gpt-5.1": EFFORT_LEVELS[:5], "gpt-5.": EFFORT_LEVELS[:6],
              "gpt-5": EFFORT_LEVELS[1:5], "gpt-": EFFORT_LEVELS[:6], "": EFFORT_LEVELS[2:5]}

    def efforts(self, model):
        return super().efforts(model) if OPENAI_REASONS.search(model) else None

    def body(self, body, request):
        body, levels, own = super().body(body, request), self.efforts(self.model.lower()), as_dict(body.get("reasoning"))
        if levels is None or self.provider.format not in ("openai", "responses"):
            return body
        effort = body.get("reasoning_effort")
        if self.provider.format == "responses":
            effort = with_effort({"reasoning_effort": own.get("effort")}, request, levels).get("reasoning_effort")
            body = {**body, "reasoning": {**own, "effort": effort}} if effort else body
        body = renamed(body, "max_tokens", "max_completion_tokens")
        return body if effort == "none" else without_keys(body, *self.FIXED)


for _name, _api in (("anthropic", "Anthropic's Messages API"), ("openai-responses", "OpenAI's Responses API"),
                    ("vertex-gemini", "Gemini on Google's Vertex AI"), ("vertex-claude", "Claude on Google's Vertex AI")):
    transformer(_name)(type("FormatName", (Transformer,), {"about": _api + ", as a format."}))


# --- Replies told anew

class Retold(BlockWriter):
    """A reply in which some blocks are told as something else; all are numbered anew.

    reads(content_block): is it one to be read? reader(piece) takes its text or arguments, reader(None) its end; both return
    parts: ("text", str), ("thinking", str) or ("tool", (name, arguments, id or None)). stop_reason follows the calls.
    """

    def __init__(self, reads, reader):
        super().__init__("", "")
        self.reads, self.reader, self.is_started = reads, reader, True    # the reply's own message_start goes by

    def events(self, events):
        reading, numbers, has_calls = None, {}, False
        for event in events:
            kind, index = (event["type"], event.get("index")) if isinstance(event, dict) else (None, None)
            if kind == "content_block_start" and self.reads(event["content_block"]):
                reading = index
            elif kind == "content_block_start":
                yield from self._close()
                self.index = numbers[index] = self.index + 1
                has_calls = has_calls or event["content_block"]["type"] == "tool_use"
                yield {**event, "index": self.index}
            elif kind == "content_block_stop" and index == reading:
                yield from self.told(self.reader(None)) + self._close()
            elif kind == "content_block_delta" and index == reading:
                delta = event["delta"]
                yield from self.told(self.reader(delta.get("text") or delta.get("partial_json") or ""))
            elif index is not None:
                yield {**event, "index": numbers[index]}
            elif kind == "message_delta" and event["delta"].get("stop_reason") in ("end_turn", "tool_use"):
                yield {**event, "delta": {**event["delta"], "stop_reason": "tool_use" if has_calls or self.calls else "end_turn"}}
            else:
                yield event

    def told(self, parts) -> list:
        events = []
        for kind, value in parts:
            if kind == "tool":
                name, arguments, id = value
                events += self.tool(len(self.calls), id, name, arguments)
            else:
                events += self.text(value) if kind == "text" else self.thinking(value)
        return events


def is_text(block: dict) -> bool:
    return block["type"] == "text"


@transformer("extrathinktag")
class ExtraThinkTag(Transformer):
    about = "Shows what a model writes between <think> and </think> as thinking, wherever it stands."
    options = {"tag": (str, "another name of the tag")}

    def events(self, events):
        return Retold(is_text, TagReader(self.options.get("tag", "think"))).events(events)


@transformer("forcereasoning")
class ForceReasoning(Transformer):
    about = "Makes a model without reasoning of its own think first, between tags, and shows that as thinking."
    PROMPT = ("Before you answer or call a tool, think the matter through step by step between <reasoning_content> and "
              "</reasoning_content>. Always write both tags, and nothing before the first. After them answer as usual.")

    def request(self, request):
        messages = [{**m, "content": self.tagged(m["content"])} if m["role"] == "assistant" else m for m in request["messages"]]
        last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=None)
        if last is not None:
            messages[last] = {**messages[last], "content": [*blocks_of(messages[last]), {"type": "text", "text": self.PROMPT}]}
        return dropped(without_keys({**request, "messages": messages}, "thinking"), ("output_config", "effort"))

    def tagged(self, content):
        """An assistant's thinking as the text that this model would have written."""
        if isinstance(content, str):
            return content
        blocks = [{"type": "text", "text": "<reasoning_content>%s</reasoning_content>\n" % block["thinking"]}
                  if block.get("type") == "thinking" and block.get("thinking") else block for block in content]
        return [block for block in blocks if block.get("type") not in ("thinking", "redacted_thinking")]

    def events(self, events):
        return Retold(is_text, TagReader("reasoning_content")).events(events)


@transformer("tooluse")
class ToolUse(Transformer):
    about = "Makes a model call tools: it must call one, and says in words what it has to say by calling ExitTool."
    EXIT = {"name": "ExitTool",
            "description": "Call this when no other tool is needed: your answer to the user goes into `response`.",
            "input_schema": {"type": "object", "required": ["response"], "properties": {
                "response": {"type": "string", "description": "Your whole answer, as the user will read it."}}}}
    REMINDER = "Tool mode is on: answer with a tool call. If no tool fits, or the task is done, call ExitTool with your answer."
    is_on = False

    def request(self, request):
        choice = as_dict(request.get("tool_choice"))
        self.is_on = choice.get("type") not in ("tool", "none") and bool(tool_schemas(request))
        return {**request, "tools": [*request["tools"], self.EXIT], "tool_choice": {**choice, "type": "any"},
                "messages": [*request["messages"], {"role": "system", "content": self.REMINDER}]} if self.is_on else request

    def events(self, events):
        pieces = []

        def read(piece):
            if piece is not None:
                pieces.append(piece)
                return []
            arguments = "".join(pieces)
            pieces.clear()
            return [("text", exit_text(arguments))]
        return Retold(lambda block: self.is_on and block.get("name") == "ExitTool", read).events(events)


def exit_text(arguments: str) -> str:
    """What a call of ExitTool says; as much as there is when its arguments are cut."""
    cut = re.sub(r"\\(u[0-9a-fA-F]{0,3})?$", "", arguments) + '"}'
    value = mended(arguments or "{}", True) or mended(cut, False) or {}
    return value["response"] if isinstance(value.get("response"), str) else arguments if arguments.strip(" {}\n") else ""


# --- Calls written as text

# what text is held back: from group 1 on to the end of its block, else until it is seen what becomes of it
CALL_LATER = Pattern(r"(?<!\s)(?:\s{1,99}\Z|\s*(?:(<tool_call>|<function=|\[TOOL_CALLS\]|<\|python_tag\|>|```[a-z_]*\s{1,9}[\[{])"
                     r"|(?:<[a-z_|]{0,13}|\[[A-Z_]{0,11}|`{1,2}|```[a-z_]{0,15}\s{0,9})\Z))")
CALL_AT_START = Pattern(r"\A\s*(\{)|" + CALL_LATER.pattern)    # Llama: the whole text is a call
# the head of a call, where its arguments follow: (its mark), (its name if that stands outside of JSON: Qwen, Llama), (Mistral)
CALL_HEAD = Pattern(r'\s*(<tool_call>|\[TOOL_CALLS\]|<\|python_tag\|>|```[a-z_]*\s)?\s*(?:<function=\s*"?([^<>\s"]+)"?\s*>|'
                    r"(?<=\[TOOL_CALLS\])([\w.-]+)\s*(?:\[CALL_ID\][^\[{]*)?(?:\[ARGS\])?)?\s*"
                    r"(?=\{|\[(?!TOOL_C)|<parameter=|</function>)")
CALL_MARK = Pattern(r"(?<!\s)(?=\s*(?:<tool_call>|<function=|\[TOOL_CALLS\]|<\|python_tag\|>|```))" + CALL_HEAD.pattern)
PARAMETER_TAG = Pattern(r'\s*<parameter="?([^<>\s"]+)"?\s*>\n?(.*?)\n?</parameter>'
                        r'(?=\s*<(?:parameter=|/function>|/tool_call>))', re.S)
FUNCTION_END = Pattern(r"\s*</(?:function|tool_call)>")
FENCE_END = Pattern(r"\s*(?:```|\{|\Z)")
CALL_END = Pattern(r"</tool_call>|</function>|```")
CALL_TAIL = Pattern(r"\s*(?:</function>)?\s*(?:</tool_call>|```(?![a-z]))?[\s,;]*")
JSON_DECODER = json.JSONDecoder(strict=False)


@transformer("texttools")
class TextTools(Transformer):
    about = "Turns calls that a model writes as text (as Qwen, Hermes, Llama and Mistral do, or as fenced JSON) into real ones."
    touches_messages = False
    tools = {}

    def request(self, request):
        self.tools = tool_schemas(request)
        return request

    def events(self, events):
        return Retold(is_text, CallReader(self.tools)).events(events) if self.tools else events


def tool_schemas(request: dict) -> dict:
    """{name: input_schema} of the request's own tools."""
    own = [tool for tool in request.get("tools") or () if tool.get("name") and isinstance(tool.get("input_schema"), dict)]
    return {tool["name"]: tool["input_schema"] for tool in own}


class CallReader:
    """Reads calls in text that is cut anywhere. From where a call may begin the text is held back to the end of its block;
    what is no call of a known tool stays text, letter by letter.
    """

    def __init__(self, tools):
        self.tools, self.pieces, self.is_held, self.begin = tools, [], False, CALL_AT_START

    def __call__(self, piece):
        if piece is None:
            parts = calls_in("".join(self.pieces), self.tools, self.begin is CALL_AT_START)
            self.__init__(self.tools)
            return parts
        self.pieces.append(piece)
        if self.is_held:
            return []
        text = "".join(self.pieces)
        found = self.begin.search(text)
        cut = found.start() if found else len(text)
        self.is_held, self.pieces = bool(found and found.lastindex), [text[cut:]]
        self.begin = CALL_LATER if cut else self.begin
        return [("text", text[:cut])]


def calls_in(text: str, tools: dict, is_start: bool) -> list:
    """The parts of a text for Retold: a "tool" for each call of a known tool in it, "text" for the rest."""
    parts, begin = [], 0
    head = is_start and CALL_HEAD.match(text) or CALL_MARK.search(text)
    while head:
        calls, end = read_call(text, head, tools)
        if calls:
            parts.append(("text", text[begin:head.start()]))
            parts += [("tool", (name, json.dumps(arguments), None)) for name, arguments in calls]
            begin = CALL_TAIL.match(text, end).end()
        head = calls and CALL_HEAD.match(text, begin) or CALL_MARK.search(text, begin if calls else head.end())
    return parts + [("text", text[begin:])]


def read_call(text: str, head, tools: dict) -> tuple:
    """([(name, input), ...], their end) of what follows this head; no calls if it is something else."""
    name, end = head[2] or head[3], head.end()
    if name and text.startswith("<", end):
        arguments, types = {}, as_dict((tools.get(name) or {}).get("properties"))
        for part in iter(lambda: PARAMETER_TAG.match(text, end), None):
            arguments[part[1]], end = fitted(part[2], types.get(part[1])), part.end()
        is_whole = FUNCTION_END.match(text, end)
    else:
        arguments, end = read_value(text, end)
        is_whole = not (head[1] or "").startswith("```") or FENCE_END.match(text, end)    # no JSON amid other text
    calls = named_call(name, arguments, tools) if name else calls_of(arguments, tools)
    return calls if is_whole else [], end


def read_value(text: str, at: int) -> tuple:
    """(JSON value at this place, its end); broken JSON is mended if a tag shows that the model was done. Else (None, at)."""
    try:
        return JSON_DECODER.raw_decode(text, at)
    except (ValueError, RecursionError):
        end = CALL_END.search(text, at)
        return (mended(text[at:end.start()], True), end.start()) if end else (None, at)


def calls_of(value, tools) -> list:
    """[(name, input)] of {"name", "arguments" or "parameters"}, or of a list of such; [] if any of it is something else."""
    if isinstance(value, list):
        found = [calls_of(item, tools) for item in value]
        return sum(found, []) if all(found) else []
    value = as_dict(as_dict(value).get("function")) or as_dict(value)
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        arguments = mended(arguments, True)
    elif arguments is None and value.keys() <= {"name", "id", "type", "arguments", "parameters"}:
        arguments = {}
    return named_call(value.get("name"), arguments, tools)


def named_call(name, arguments, tools) -> list:
    return [(name, arguments)] if as_text(name) in tools and isinstance(arguments, dict) else []


# --- Broken arguments

@transformer("enhancetool")
class EnhanceTool(TextTools):
    about = "Repairs the arguments of calls: broken JSON, and types that are not the schema's. They come whole, not in pieces."

    def events(self, events):
        return Retold(self.reads, self.read).events(self.waiting(events))

    def waiting(self, events):
        """The events; all from the first call on wait for the stop reason, which alone tells whether the last call was cut."""
        held, self.is_whole = [], False
        for event in events:
            kind = event["type"] if isinstance(event, dict) else None
            if held or kind == "content_block_start" and event["content_block"]["type"] == "tool_use":
                held.append(event)
            else:
                yield event
            if kind == "message_delta":
                self.is_whole = event["delta"].get("stop_reason") != "max_tokens"
                yield from held
                held = []
        yield from held

    def reads(self, block):
        self.call, self.pieces = block, []
        return block["type"] == "tool_use"

    def read(self, piece):
        if piece is not None:
            self.pieces.append(piece)
            return []
        arguments = self.arguments(self.call["name"], "".join(self.pieces), self.is_whole)
        return [("tool", (self.call["name"], arguments, self.call["id"]))]

    def arguments(self, name, text, is_whole) -> str:
        """The arguments as the client can read them; right or empty ones, and what cannot be repaired, as they are."""
        value = mended(text, is_whole) if text.strip() else None
        if value and value.keys() == {RAW_ARGUMENTS}:    # a whole JSON reply that was broken
            return self.arguments(name, value[RAW_ARGUMENTS], is_whole)
        better = json.dumps(fitted(value, self.tools.get(name)))
        return text if value is None or is_json_object(text) and better == json.dumps(value) else better


def mended(text: str, is_whole: bool):
    """The object that broken JSON clearly means, else None. Only if the model was done (is_whole) the brackets that are missing
    at the end are added, and never where it ends inside a string: half a shell command must not run.
    """
    fence = re.fullmatch(r"\s*```[a-z]*\s(.*?)```\s*", text, re.S)
    text = (fence[1] if fence else text).strip()
    for reading in (JSON_DECODER.decode, read_surplus, parse_json5, read_python):
        try:
            value = reading(text)
            value = JSON_DECODER.decode(value) if isinstance(value, str) else value    # JSON in JSON
            if isinstance(value, dict) and json.dumps(value, allow_nan=False):
                return value
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError, ConfigError):
            pass    # not in this way
    whole = completed(text) if is_whole else None
    return mended(whole, False) if whole else None


def read_surplus(text):
    """JSON with brackets to spare at its end."""
    value, end = JSON_DECODER.raw_decode(text)
    if text[end:].strip(" \t\r\n]}"):
        raise ValueError("more than brackets follows")
    return value


def read_python(text):
    """The literal of a Python dict: True, None and single quotes."""
    import ast
    import warnings
    warnings.filterwarnings("ignore", category=SyntaxWarning)    # a model's odd escapes are none of the owner's business
    return ast.literal_eval(text)


def completed(text: str):
    """The text with the brackets that are missing at its end; None if it ends inside a string or is broken in another way."""
    expected = []
    for part in re.finditer(r'"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\'|["\'\[{\]}]', text, re.S):
        if part[0] in "\"'" or part[0] in "]}" and (not expected or expected.pop() != part[0]):
            return None
        if part[0] in "[{":
            expected.append("]" if part[0] == "[" else "}")
    return re.sub(r",\s*$", "", text) + "".join(reversed(expected)) if expected else None


def fitted(value, schema):
    """The value with what plainly has another type than its schema says put right: "3" -> 3, "true" -> true, string -> [string],
    and an object or list that was written as a string.
    """
    schema = as_dict(schema)
    if isinstance(value, dict):
        properties = as_dict(schema.get("properties"))
        return {key: fitted(item, properties.get(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [fitted(item, schema.get("items")) for item in value]
    types = schema_types(schema)
    if not isinstance(value, str) or not types or "string" in types:
        return value
    meant = json_or_text(value)
    kind = {bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}.get(type(meant))
    if kind in types or kind == "integer" and "number" in types:
        return fitted(meant, schema)
    takes_list = "array" in types and "string" in (schema_types(schema.get("items")) or ("string",))
    return [value] if takes_list else value


def schema_types(schema) -> tuple:
    """The JSON types that a schema names; () when it leaves them open."""
    schema = as_dict(schema)
    branches = [schema_types(branch) for branch in schema.get("anyOf") or schema.get("oneOf") or ()]
    types = schema.get("type") or ()
    return ((types,) if isinstance(types, str) else tuple(types)) or (sum(branches, ()) if all(branches) else ())


# --- What a provider says it does not take

SAID_NAME = r"[`'\"\s:\[({]+([a-z_$][\w$.\[\]-]*)"
OPTIONAL = (r"\b(stream_options|reasoning_effort|parallel_tool_calls|tool_choice|response_format|temperature|top_[pk]"
            r"|thinking_budget|enable_thinking|context_management|output_config|safeguards|cache_control|repetition_penalty)\b")
UNWANTED = (r"(?:not (?:be )?(?:supported|permitted|allowed|used|specified|a valid)|(?:not|n't) support|unsupported|unknown"
            r"|unexpected|deprecated|incompatible|no such|additional properties)")
REFUSALS = tuple((Pattern(pattern, re.I | re.S), name) for pattern, name in (    # the first that fits; "": its group
    (r"function tools with reasoning_effort are not supported|set reasoning_effort to .none", "effort-beside-tools"),
    (r"reasoning_content.{0,60}must be passed back|(?:missing .?reasoning_content|reasoning_content is missing)", "+reasoning"),
    (r"system message must be at the (?:beginning|start)|roles must alternate|system role not supported"
     r"|only (?:supports? )?user.{0,20}assistant roles|role\S* unknown variant .system|unexpected role .system"
     r"|role\b.{0,60}(?:input should be|must be) .?user|messages\[\d+\]\.role. does not support .system", "role:system"),
    (r"invalid beta flag", "betas"),
    (r"unexpected value\(s\)(.{1,400}) for the .anthropic-beta. header", "betas="),
    (r"only type=enabled is allowed|input tag 'adaptive'|adaptive thinking is not supported"
     r"|must be greater than \W?thinking.budget_tokens", "thinking.type=enabled"),
    (r"does not support thinking|thinking is not supported", "thinking"),
    (r"does not support the effort parameter", "output_config.effort"),
    (r"(?:unsupported content type|input tag).{0,60}tool_reference", "tool_reference"),
    (r"max_(?:completion_|output_)?tokens.{0,80}?(?:supports at most|less than or equal to|no more than) \W?(\d+)",
     "max_tokens="),
    (r"range of max_tokens (?:is|should be) \[\d+, ?(\d+)\]|max_tokens: \d+ > (\d+), which is the max", "max_tokens="),
    (r"verified to generate reasoning summaries", "reasoning.summary"),
    (r"verified to stream this model", "stream"),
    (r"encrypted content is not supported", "include"),
    (r"could not finish the message because max_tokens", "+max_tokens"),
    (r"maximum context length is (\d+) tokens.{0,80}?(?:has (\d+) input tokens|\((\d+) in the messages)", "-max_tokens"),
    (r"reasoning.{0,80}?(?:supported values are|must be|input should be)(.{1,200})", "reasoning_effort="),
    (r"response_format.{0,80}(?:unavailable|not support|unsupported|unknown variant)|not support response.format"
     r"|json_schema\W{1,3}is (?:not supported|unavailable)", "response_format"),
    (r"thinking may not be enabled when tool_choice", "thinking-beside-forced-tool"),
    (r"(?:temperature|top_[pk])\W.{0,60}when thinking is enabled", "sampling-beside-thinking"),
    (r"invalid temperature", "temperature"),
    (r"temperature\W{1,3}and\W{1,3}top_p\W{1,3}cannot both", "top_p"),
    (r"cannot specify both 'thinking' and 'reasoning_effort'", "reasoning_effort"),
    (r"enable_thinking must be set to false", "enable_thinking=false"),
    (r"extra_forbidden.{0,40}?loc\W+body\W+(\w[\w'\", ]*)", ""),
    (r"([\w.$]+)\W{1,3}extra (?:inputs are|fields) not permitted", ""),
    (r"(?:unsupported value|(?:unsupported|unknown|unrecognized|unexpected|invalid) (?:request )?"
     r"(?:parameter|argument|field|property|key|name)(?:\(?s\)?)?(?: supplied| in object)?)" + SAID_NAME, ""),
    (r"(?:property|parameter|argument|field)\W{1,3}(?!is )([\w.$]+)\W{1,3}(?:is )?"
     r"(?:not supported|unsupported|not allowed|unknown)", ""),
    (r"(?:argument not supported on this model|additional properties are not allowed"
     r"|not support (?:the )?(?:parameter|argument|field)s?)" + SAID_NAME, ""),
    (r"(?<!model )[`'\"]([\w.$\[\]]+)[`'\"] (?:is|are|was) (?:not (?:supported|allowed|permitted)|unsupported|unexpected)", ""),
    (r"([\w.]+) (?:is|are) not supported (?:with|by|for|on) this model", ""),
    (OPTIONAL + ".{0,60}?" + UNWANTED, ""),
    (UNWANTED + ".{0,60}?" + OPTIONAL, ""),
))
ESSENTIALS = {"model", "messages", "role", "content", "type", "text", "tools", "tool_calls", "tool_call_id", "id", "name",
              "function", "parameters", "input_schema", "input", "contents", "stream", "system", "source", "data", "image_url",
              "url", "prompt", "arguments", "value"}


def unsupported_parameter(message: str):
    """What a provider's refusal says it does not take, as a name for without_parameter; None if it says nothing of the kind.

    "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead." -> "max_tokens"
    "max_tokens is too large: 32000. This model supports at most 16384 completion tokens" -> "max_tokens=16384"
    """
    found = ((pattern.search(message[:4000]), name) for pattern, name in REFUSALS)
    return next(filter(None, (refused_name(match, name) for match, name in found if match)), None)


def refused_name(match, name: str):
    groups = [group for group in match.groups() if group]
    if name in REFUSED_VALUES:
        values = re.findall(REFUSED_VALUES[name], groups[0])
        return name + "|".join(dict.fromkeys(values)) if values else None
    if name == "-max_tokens":    # the input alone fits the window: the provider can choose the length
        return name if int(groups[1]) < int(groups[0]) else None
    if name:
        return name
    steps = [step for step in re.findall(r"[\w$-]+", groups[0]) if not step.isdigit()]
    path = ".".join(steps[steps[:1] == ["body"]:])    # FastAPI: "body.top_p"
    return None if path.rpartition(".")[2] in ESSENTIALS else path


REFUSED_VALUES = {"max_tokens=": r"\d+", "betas=": r"[\w-]+", "reasoning_effort=": r"\b(?:%s)\b" % "|".join(EFFORT_LEVELS)}


def without_parameter(body: dict, headers: dict, name: str) -> tuple:
    """(body, headers) without what `name` names, or with it so that the provider takes it; the very objects if nothing is to do.

    A parameter ("top_p"), a path ("thinking.display", "tools.defer_loading"), "name=value|value" (only these), one of REWRITES.
    """
    own, _, values = name.partition("=")
    if own in ("betas", "anthropic-beta"):
        return body, without_betas(headers, values and values.split("|"))
    if name in REWRITES:
        return REWRITES[name](body) if "messages" in body else body, headers
    if own == "max_tokens":
        return capped(body, int(values)), headers
    if own == "reasoning_effort" and values:
        return with_effort_of(body, values.split("|")), headers
    snake_case = re.sub(r"(?<=[a-z])([A-Z])", r"_\1", name).lower()
    paths = (name, snake_case, "messages." + name, "tools.function." + name, "tools." + name)
    return next((new for new in (dropped(body, path.split(".")) for path in paths) if new is not body), body), headers


def with_effort_of(body: dict, levels) -> dict:
    """The body with an effort that is one of these levels, or without any."""
    effort = body.get("reasoning_effort")
    level = nearest_effort(effort, levels)
    if effort is None or level == effort:
        return body
    return {**body, "reasoning_effort": level} if level else without_keys(body, "reasoning_effort")


def without_betas(headers: dict, refused) -> dict:
    """Headers without these betas; without any if none are named."""
    name = next((name for name in headers if name.lower() == "anthropic-beta"), None)
    betas = [beta.strip() for beta in headers[name].split(",")] if name else []
    left = [beta for beta in betas if refused and beta not in refused]
    return headers if left == betas else {**headers, name: ",".join(left)} if left else without_keys(headers, name)


def is_chat(body: dict) -> bool:
    """Chat completions, not Messages: there the system prompt stands among the messages, and tools are functions."""
    has_schema = any("input_schema" in tool for tool in body.get("tools") or ())
    return "messages" in body and "system" not in body and "anthropic_version" not in body and not has_schema


def with_reasoning(body: dict) -> dict:
    """The body with reasoning on every assistant message, as some demand while they think, also of other models' turns.

    DeepSeek refuses an empty string, and takes a space.
    """
    def thoughtful(message):
        if message["role"] != "assistant" or message.get("reasoning_content") or message.get("reasoning"):
            return message
        if is_chat(body):
            return {**message, "reasoning_content": " "}
        blocks = blocks_of(message)
        thought = {"type": "thinking", "thinking": " ", "signature": ""}
        return message if any(block.get("type") == "thinking" for block in blocks) else {**message, "content": [thought, *blocks]}
    return with_messages(body, thoughtful)


def alternating(body: dict) -> dict:
    """The body with later system messages told by the user, and neighbours that are both the user's joined."""
    messages = in_turn(body["messages"]) if is_chat(body) else without_system_roles(body["messages"])
    return body if messages == body["messages"] else {**body, "messages": messages}


def joined_content(one, two):
    """Two contents, strings or lists of blocks, as one."""
    if isinstance(one, str) and isinstance(two, str):
        return one + "\n\n" + two
    return blocks_of({"content": one}) + blocks_of({"content": two})


def schema_in_words(body: dict, kind=None) -> dict:
    """The body with its JSON schema told in the system prompt; kind: the response_format that stays ("json_object"), if any."""
    wanted = as_dict(body.get("response_format") or as_dict(body.get("output_config")).get("format"))
    if not wanted or wanted.get("type") in (kind, "text"):
        return body
    schema = as_dict(wanted.get("json_schema") or wanted).get("schema")
    words = "Answer with nothing but a JSON object" + (" that follows this schema: %s" % json.dumps(schema) if schema else ".")
    if "response_format" not in body:
        system = joined_content(body["system"], words) if body.get("system") else words
        return {**dropped(body, ("output_config", "format")), "system": system}
    first = body["messages"][:1] if body["messages"][0]["role"] == "system" else []
    told = {"role": "system", "content": joined_content(first[0]["content"], words) if first else words}
    return {**without_keys(body, "response_format"), "messages": [told, *body["messages"][len(first):]],
            **({"response_format": {"type": kind}} if kind else {})}


def thinking_enabled(body: dict) -> dict:
    """Adaptive thinking as thinking with a budget, for those who do not know the word; no word of its being off. What a cap of
    max_tokens leaves is the most that a budget may be."""
    thinking, budget = as_dict(body.get("thinking")), max(1024, min(31999, (body.get("max_tokens") or 32000) - 1))
    kind = thinking.get("type")
    if kind == "adaptive" or first_count(thinking.get("budget_tokens")) > budget:
        return {**body, "thinking": {"type": "enabled", "budget_tokens": budget}}
    return without_keys(body, "thinking") if kind == "disabled" else body


def references_in_words(body: dict) -> dict:
    """tool_reference blocks, which stand in the results of Claude Code's ToolSearch, as text."""
    def told(block):
        inner = block.get("content")
        content = mapped(told, inner) if isinstance(inner, list) else inner
        if block.get("type") == "tool_reference":
            return {"type": "text", "text": block_text(block)}
        return block if content is inner else {**block, "content": content}
    return with_messages(body, told)


def without_billing_header(body: dict) -> dict:
    """The body without the line that changes with every run of Claude Code."""
    texts = system_texts(body)
    return body if texts == blocks_of({"content": body.get("system")}) else {**body, "system": texts}


REWRITES = {    # names that mean more than leaving a parameter out
    "role:system":           alternating,
    "+reasoning":            with_reasoning,
    "response_format":       schema_in_words,
    "output_config.format":  schema_in_words,
    "thinking.type=enabled": thinking_enabled,
    "tool_reference":        references_in_words,
    "billing-header":        without_billing_header,
    "effort-beside-tools":   lambda body: {**body, "reasoning_effort": "none"} if "tools" in body else body,    # gpt-5.4, 5.6
    "thinking-beside-forced-tool": lambda body: (
        without_keys(body, "thinking") if as_dict(body.get("tool_choice")).get("type") in ("any", "tool") else body),
    "sampling-beside-thinking": lambda body: (
        without_keys(body, "temperature", "top_p", "top_k") if thinking_kind(body) == "enabled" else body),
    "stream":                lambda body: without_keys(body, "stream", "stream_options"),
    "enable_thinking=false": lambda body: {**body, "enable_thinking": False} if "enable_thinking" in body else body,
    "thinking":              lambda body: without_keys(body, "thinking", "reasoning_effort", "reasoning", "enable_thinking"),
    "max_tokens":            lambda body: renamed(body, "max_tokens", "max_completion_tokens") if is_chat(body) else body,
    "max_completion_tokens": lambda body: renamed(body, "max_completion_tokens", "max_tokens"),
    "+max_tokens":           lambda body: {**body, "max_completion_tokens": 4096}    # some of it goes into thinking
        if first_count(body.get("max_completion_tokens"), 4096) < 4096 else body,
    "-max_tokens":           lambda body: without_keys(body, "max_tokens", "max_completion_tokens") if is_chat(body) else body,
}


# === 7. Router ======================================================================

class Turn(NamedTuple):
    """All that a decision may depend on. tokens: () -> the estimate, called only if a rule needs it; last_input: input tokens of
    the session's last reply; override: a project's or session's Router (parse_override); custom: the owner's route(), or None."""
    request: dict
    headers: dict = {}
    ingress: str = "anthropic"
    tokens: object = int
    last_input: int = 0
    session: str = None
    override: dict = {}
    custom: object = None


class Route(NamedTuple):
    """Who answers and why. request: as it goes on; fallbacks: who may take over, (Provider, model) in order; is_listed: these are
    the owner's own list, not the other routes; note: what went wrong with the custom router, for the log."""
    provider: Provider
    model: str
    rule: str
    reason: str
    request: dict
    fallbacks: tuple = ()
    is_listed: bool = False
    note: str = None


class Choice(NamedTuple):
    """A rule's answer: no targets, it passes on; the first target is the route, the others its fallbacks."""
    rule: str
    targets: tuple = ()
    reason: str = None


def choose_route(turn: Turn, config: Config) -> Route:
    """The Route of a turn: the first rule that claims it. ApiError(400) where it names a provider that does not exist."""
    config = overridden(config, turn)
    *passed, choice = choices(turn, config)
    note = next((other.reason for other in passed if other.rule == "custom"), None)
    (provider, model), fallbacks, is_listed = choice.targets[0], *fallback_targets(choice, config)
    fallbacks = tuple(target for target in fallbacks if has_window(turn, *target))
    return Route(provider, model, choice.rule, choice.reason, untagged(turn.request)[1], fallbacks, is_listed, note)


def explain_route(turn: Turn, config: Config):
    """(rule, "provider,model" or None, reason or None) of every rule tried; the last claims the turn. Errors as choose_route."""
    for choice in choices(turn, overridden(config, turn), is_thorough=True):
        yield choice.rule, target_name(choice.targets[0]) if choice.targets else None, choice.reason


def overridden(config, turn) -> Config:
    return config._replace(router={**config.router, **turn.override}) if turn.override else config


def choices(turn, config, is_thorough=False):
    """Each rule's Choice, in the order of RULES, to the one that claims the turn. Only to be thorough a task without a route is
    looked at."""
    for rule in NAMED_RULES if turn.custom else NAMED_RULES[1:]:
        choice = rule(turn, config) or Choice(rule.__name__)
        yield choice
        if choice.targets:
            return
    for rule, reason_of in TASK_RULES.items():
        names = config.router.get(rule)
        reason = reason_of(turn, config) if names or is_thorough else None
        targets = resolved_targets(names, config) if reason else ()
        if reason and not targets:
            reason += ", but Router.%s is not set" % rule
        yield Choice(rule, targets, reason)
        if targets:
            return
    raise ApiError(503, "there is no route for this: Router.default is not set")


def resolved_targets(names, config, besides=()) -> tuple:
    """The (Provider, model) of each "provider,model", each once, but for those of `besides`."""
    targets = {target_name(target): target for target in map(config.target, dict.fromkeys(names or ())) if target}
    return tuple(target for name, target in targets.items() if name not in besides)


# --- Rules: models that are named

TAG = Pattern(r"\s*<CCR-SUBAGENT-MODEL>([^<>]*)</CCR-SUBAGENT-MODEL>\s*")
LIST_PREFIX = "anthropic/"          # GET /v1/models puts it before our ids: the client's picker shows no others


def custom(turn, config):
    """The answer of the owner's route(request, config, info). What goes wrong in it is noted and passes the turn on.

    config: config.json as it stands in the file. info: {"tokens": () -> estimate, "session", "headers", "ingress", "last_input"}.
    """
    info = {key: getattr(turn, key) for key in ("tokens", "session", "headers", "ingress", "last_input")}
    try:
        answer = turn.custom(turn.request, config.raw, info)
    except (Exception, SystemExit) as e:        # whatever the owner's code raises
        return Choice("custom", (), "the custom router failed with %s: %s" % (type(e).__name__, e))
    target = target_or_owner(answer, config) if isinstance(answer, str) else None
    if target:
        return Choice("custom", (target,), "the custom router chose it")
    return Choice("custom", (), "the custom router's answer is no model of this config: %s" % shown(answer)) if answer else None


def explicit(turn, config):
    asked = as_text(turn.request.get("model")).strip()
    if asked.lower().startswith(LIST_PREFIX) and not target_or_owner(asked, config):
        asked = asked[len(LIST_PREFIX):]
    if "," in asked:
        return Choice("explicit", (named_target(asked, config, "model"),), "the client asked for this model by name")
    target = None if is_tier(turn, asked) else config.owner(asked)
    return Choice("explicit", (target,), "the client asked for a model that %s lists" % target[0].name) if target else None


def is_tier(turn, model) -> bool:
    """Whether a model's name is Claude Code's own word, whoever lists it."""
    return turn.ingress == "anthropic" and model.lower().startswith("claude-")


def subagent(turn, config):
    tag = untagged(turn.request)[0]
    if tag is not None:
        return Choice("subagent", (named_target(tag, config, "<CCR-SUBAGENT-MODEL>"),), "the subagent's tag names this model")


NAMED_RULES = (custom, explicit, subagent)


def target_or_owner(text, config):
    return config.target(text) or config.owner(text.strip())


def named_target(text, config, where):
    """The target that a client named; a 400 that says what there is otherwise."""
    target, (name, _, model) = target_or_owner(text, config), (part.strip() for part in text.partition(","))
    if target:
        return target
    words = no_provider(name, config) if name and model else "expected \"provider,model\", got %s" % shown(text)
    raise ApiError(400, "%s: %s" % (where, words))


def messages_of(request):
    return request.get("messages") or ()


def user_message(messages) -> dict:
    """The first of these messages that is the user's."""
    return next((message for message in messages if message.get("role") == "user"), {})


def split_tag(content) -> tuple:
    """(the model that a tag names or None, the content without tags; the same one if it has none). A block of which nothing is
    left goes."""
    if isinstance(content, str):
        match = TAG.match(content)
        return (match[1].strip(), content[match.end():]) if match else (None, content)
    found, rest = None, []
    for block in content or ():
        tag, text = split_tag(block.get("text")) if block.get("type") == "text" else (None, None)
        found = tag if found is None else found
        if tag is None or text:
            rest.append(block if tag is None else {**block, "text": text})
    return found, content if found is None else rest


def untagged(request: dict) -> tuple:
    """(the model that a subagent's tag names or None, the request without such tags, the very same object if it has none).

    A tag opens the system prompt, one of its blocks, or a text of the first user message.
    """
    first = user_message(messages_of(request))
    (tag, system), (prompt_tag, content) = split_tag(request.get("system")), split_tag(first.get("content"))
    if tag is not None:
        request = {**request, "system": system}
    if prompt_tag is not None:
        changed = {**first, "content": content}
        request = {**request, "messages": [changed if message is first else message for message in request["messages"]]}
    return prompt_tag if tag is None else tag, request


def texts_in(content) -> list:
    """The texts of a content: a string, or blocks."""
    if isinstance(content, str):
        return [content]
    return [block["text"] for block in content or () if block.get("type") == "text" and isinstance(block.get("text"), str)]


# --- Rules: tasks. Each says in words why the turn is one, or None. Signals: claude-code-wire.md, section 3

def image(turn, config):
    content = dicts_in(user_message(reversed(messages_of(turn.request))).get("content"))
    inner = [block for result in content if result.get("type") == "tool_result" for block in dicts_in(result.get("content"))]
    is_image = any(block.get("type") == "image" for block in content + inner)
    return "the newest message holds an image" if is_image and not config.force_image_agent else None


def long_context(turn, config):
    threshold, tokens = config.router.get("longContextThreshold", DEFAULT_THRESHOLD), turn.tokens()
    if tokens > threshold:
        return "about %d tokens are more than the threshold of %d" % (tokens, threshold)
    if turn.last_input > threshold and tokens > LONG_SESSION_TOKENS:
        return "the session's last turn had %d tokens, more than the threshold of %d" % (turn.last_input, threshold)


def web_search(turn, config):
    is_search = any(as_text(tool.get("type")).startswith("web_search") for tool in dicts_in(turn.request.get("tools")))
    return "the request is a web search" if is_search else None


def background(turn, config):
    request, model = turn.request, as_text(turn.request.get("model"))
    if turn.headers.get("x-claude-1p-request-class") == "summary-extraction":
        return "the client calls it a summary"
    if turn.headers.get("x-claude-code-request-class") == "auxiliary":
        return "the client calls it auxiliary work"
    thinking, form = as_dict(request.get("thinking")).get("type", "disabled"), as_dict(request.get("output_config")).get("format")
    if form and thinking == "disabled" and not request.get("tools"):
        return "a short answer in a fixed form, without tools or thinking, as for a title"
    return "%.100s is a small model" % model if "haiku" in model.lower() else None


def think(turn, config):
    thinking = as_dict(turn.request.get("thinking"))
    if config.router.get("thinkRule") == "always":
        return "thinkRule is always, and the request speaks of thinking" if thinking else None
    if is_planning(turn.request):
        return "plan mode is active"
    effort = as_dict(turn.request.get("output_config")).get("effort")
    if effort in ("xhigh", "max"):
        return "effort %s asks for the think model" % effort
    if thinking.get("type") == "enabled":
        return "thinking is switched on"
    prompt = newest_prompt(turn.request).lower()
    return "the prompt says ultrathink" if "ultrathink" in prompt and ULTRATHINK.search(prompt) else None


def of_family(tier):
    """The rule for the client's own models of one family; a task's rule comes before it."""
    def family(turn, config):
        model = as_text(turn.request.get("model"))
        return "%.100s is a model of the %s family" % (model, tier) if tier in model.lower() else None
    return family


def default(turn, config):
    model = as_text(turn.request.get("model"))
    if is_tier(turn, model) or not model:
        return "no other rule applies"
    return "no provider lists %s, and no other rule applies" % shown(model)


TASK_RULES = {                      # key of Router -> the rule; the first that has a route and a reason claims the turn
    "image": image, "longContext": long_context, "webSearch": web_search, "background": background, "think": think,
    **{tier: of_family(tier) for tier in TIERS}, "default": default,
}
RULES = (*(rule.__name__ for rule in NAMED_RULES), *TASK_RULES)
LONG_SESSION_TOKENS = 20000         # what a request must have itself to count as part of a long session
ULTRATHINK = Pattern(r"\bultrathink\b")
REMINDER = Pattern(r"<system-reminder>.*?</system-reminder>", re.DOTALL)


def newest_prompt(request) -> str:
    """What the user last wrote: the newest user text that is not all the client's own reminders."""
    for message in reversed(messages_of(request)):
        if message.get("role") == "user":
            prompt = "\n".join(REMINDER.sub("", text) for text in texts_in(message.get("content"))).strip()
            if prompt:
                return prompt
    return ""


def is_planning(request) -> bool:
    """Whether the client says that plan mode is on: by its permission mode, or by the newest text that says on or off."""
    guards = dicts_in(request.get("safeguards"))
    if any(as_dict(guard.get("classifier_context")).get("permission_mode") == "plan" for guard in guards):
        return True
    said = [message.get("content") for message in messages_of(request) if message.get("role") != "assistant"]
    for content in reversed([request.get("system"), *said]):
        for text in reversed(texts_in(content)):
            if "lan mode" in text:              # looked for first: looking backwards is slow
                on, off = text.rfind("Plan mode is active"), text.rfind("xited plan mode")
                if on != off:                   # both are -1: it says neither
                    return on > off
    return False


# --- Fallback

def fallback_targets(choice: Choice, config: Config) -> tuple:
    """(targets, is_listed): who may take over a turn. The rule's own list; or, unless a model was named, the other routes."""
    if config.fallback is False:
        return (), False
    rule, wanted = choice.rule, (target_name(choice.targets[0]),)
    if rule not in config.fallback and (rule == "custom" or rule in TIERS):     # to claude-code-router these are default turns
        rule = "default"
    listed = (*map(target_name, choice.targets[1:]), *config.fallback.get(rule, ()))
    if listed or rule in config.fallback:
        return resolved_targets(listed, config, wanted), True
    if choice.rule in ("explicit", "subagent"):                                 # a named model is an order
        return (), False
    return resolved_targets([name for rule in ROUTES for name in config.router.get(rule, ())], config, wanted), False


def may_fall_back(error: ApiError, is_listed: bool) -> bool:
    """Whether another target may be asked after this error: one of the owner's list after any failure of the provider, one of the
    other routes when the target is busy or absent. Never after an error that is about the request itself."""
    if is_listed:
        return error.status in (404, 408, 409, 429) or error.status >= 500
    return error.status in (404, 429, 503, 529) or is_unreachable(error)


def is_unreachable(error) -> bool:
    return error.is_network and error.status == 502     # 504 was reached, but silent


class Rests:
    """Which models had a bad moment and are better asked later. Keys are (provider name, model), times seconds of any clock."""

    def __init__(self):
        self.book = {}              # key -> (failures that brought a rest, 5xx in a row, end of the rest)

    def fail(self, key, error: ApiError, now: float) -> None:
        """A 429, a 404, a failed connection or the second 5xx in a row brings a rest: Retry-After or 30 s, doubling to 5 min."""
        rests, faults, until = self.book.pop(key, (0, 0, 0))
        is_absent = error.status in (404, 429) or is_unreachable(error)
        faults = faults + 1 if error.status >= 500 and not is_absent else 0
        if is_absent or faults >= 2:
            if now >= until:        # turns that failed side by side count once
                rests += 1
            until = max(until, now + min(retry_seconds(error) * 2 ** min(rests - 1, 9), MAX_REST_S))
        self.book[key] = rests, faults, until
        if len(self.book) > 1000:
            self.book = dict(list(self.book.items())[-500:])    # no deletion that another thread could stumble over

    def succeed(self, key) -> None:
        self.book.pop(key, None)

    def order(self, targets, now: float) -> list:
        """The (Provider, model) targets with those that rest put last."""
        return sorted(targets, key=lambda target: self.book.get((target[0].name, target[1]), (0, 0, 0))[2] > now)


REST_S, MAX_REST_S = 30, 300


def retry_seconds(error) -> float:
    try:
        return max(1.0, float(error.retry_after))
    except (TypeError, ValueError):
        return REST_S


# --- Windows, sessions, the system prompt

def fit_request(request: dict, provider: Provider, model: str, tokens) -> dict:
    """The request with max_tokens at what the model's window leaves. ApiError(400) if the prompt itself is too long."""
    window, longest = window_of(provider, model), provider.model(model).max_tokens
    limits = [longest] if longest else []
    if window:
        count = tokens()
        if count >= window:
            raise ApiError(400, "prompt is too long: %d tokens > %d maximum" % (count, window))
        limits.append(max(1, window - count - count // 20))     # the estimate may be a little low
    return with_max_tokens(request, min(limits)) if limits else request


def window_of(provider, model):
    """The most tokens that a model takes, or None if that is not told."""
    return provider.model(model).context or provider.context


def has_window(turn, provider, model) -> bool:
    """Whether the prompt can fit the model's window."""
    window = window_of(provider, model)
    return not window or turn.tokens() < window


def with_max_tokens(request: dict, limit: int) -> dict:
    """The request with max_tokens at most `limit`, and a thinking budget below that. A request without max_tokens gets none."""
    wanted, thinking = request.get("max_tokens"), as_dict(request.get("thinking"))
    if type(wanted) is not int or wanted <= limit:
        return request
    request, budget = {**request, "max_tokens": limit}, thinking.get("budget_tokens")
    if thinking.get("type") == "enabled" and type(budget) is int and budget >= limit:      # 1024 is Anthropic's least
        request["thinking"] = {**thinking, "budget_tokens": limit - 1} if limit > 1024 else {"type": "disabled"}
    return request


SESSION_HEADERS = ("x-claude-code-session-id", "x-session-id", "session-id")     # Claude Code; opencode; Codex
SESSION_NAME = Pattern(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def session_of(headers: dict, request: dict):
    """The session's id, from the headers or from either form of metadata.user_id; None. It is safe as a file's name."""
    user = as_text(as_dict(request.get("metadata")).get("user_id"))
    inner = as_dict(json_or_text(user)).get("session_id") if user[:1] == "{" else user.partition("_session_")[2]
    candidates = [headers.get(SESSION_HEADERS[0]), inner, *map(headers.get, SESSION_HEADERS[1:])]
    return next((name for name in candidates if isinstance(name, str) and SESSION_NAME.fullmatch(name)), None)


def rewritten_system(request: dict, text: str) -> dict:
    """The request with `text` in place of what comes before the last <env> in its system prompt (REWRITE_SYSTEM_PROMPT).

    As in claude-code-router the first block is never it; the same request if no other holds <env>.
    """
    system = dicts_in(request.get("system"))
    at = next((i for i, block in enumerate(system) if i and "<env>" in as_text(block.get("text"))), None)
    if at is None:
        return request
    before, mark, after = system[at]["text"].rpartition("<env>")
    return {**request, "system": [*system[:at], {**system[at], "text": text + mark + after}, *system[at + 1:]]}


# --- Tokens

FIXED_TOKENS = {"message": 4, "tool_use": 9, "tool_result": 5, "tools": 60}
PIECE, PIECES, STEP = 64, 16, 1024    # of a long text 64 characters in every 1,024 count, but at least 16 such pieces
PIXELS_PER_TOKEN, MAX_IMAGE_TOKENS, UNKNOWN_IMAGE_TOKENS = 750, 4784, 1500
PDF_TOKENS, PDF_BYTES = 1500, 65536           # a guess per started 64 kB: what a page costs depends on the provider


def estimate_tokens(request: dict, model: str, memo=None, add_up=None) -> int:
    """About how many input tokens the request costs with this model, in linear time and without a tokenizer.

    Features of the text times weights that the model's family earned on eight real tokenizers (median error 3 %). Base64 is
    never counted as text, an image by its pixels. `memo` (a TokenMemo) spares texts that were counted before: sessions send
    the same ones each turn; add_up(messages, family, count) may know the sum of whole messages. Thinking of earlier turns is not
    counted: nearly no provider gets it again.
    """
    weights, family = weights_of(model)

    def count(text):
        return count_text(text, weights, family, memo)
    def count_message(message):
        return FIXED_TOKENS["message"] + count_content(message.get("content"), count)
    messages = request.get("messages") or []
    total = count_content(request.get("system"), count)
    total += add_up(messages, family, count_message) if add_up else sum(map(count_message, messages))
    if request.get("tools"):
        total += FIXED_TOKENS["tools"] + sum(count(one_line(tool)) for tool in request["tools"])
    return round(total)


def count_content(content, count) -> float:
    if isinstance(content, str):
        return count(content)
    return sum(BLOCK_TOKENS.get(block.get("type"), count_unknown)(block, count) for block in dicts_in(content))


def count_call(block, count) -> float:
    return FIXED_TOKENS["tool_use"] + count(one_line(block.get("input")))


def count_image(block, count) -> float:
    data = as_dict(block.get("source")).get("data")
    size = image_size(data) if isinstance(data, str) else None
    return min(size[0] * size[1] / PIXELS_PER_TOKEN, MAX_IMAGE_TOKENS) if size else UNKNOWN_IMAGE_TOKENS


def count_document(block, count) -> float:
    source = as_dict(block.get("source"))
    kind, data = source.get("type"), source.get("data") or ""
    if kind in ("text", "content"):
        return count_content(data if kind == "text" else source.get("content"), count)
    return PDF_TOKENS * (1 + len(data) * 3 // 4 // PDF_BYTES)


def count_unknown(block, count) -> float:
    """The readable members of search results and whatever comes next; never `data`, `thinking`, `encrypted_content`."""
    return sum(count_content(block[key], count) for key in ("text", "title", "url", "source", "content")
               if isinstance(block.get(key), (str, list)))


BLOCK_TOKENS = {    # type of content block -> its tokens
    "text":            lambda block, count: count(str(block.get("text") or "")),
    "image":           count_image,
    "document":        count_document,
    "tool_use":        count_call,
    "server_tool_use": count_call,
    "tool_result":     lambda block, count: FIXED_TOKENS["tool_result"] + count_content(block.get("content"), count),
}


def one_line(value) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


class TokenMemo:
    """What texts cost, by their hash: the newest `size` to 2 x `size` of them, about 200 bytes each.

    Two generations in place of an order of use: threads may share it without a lock.
    """

    def __init__(self, size=16384):
        self.size, self.young, self.old = size, {}, {}

    def get(self, key):
        value = self.young.get(key)
        if value is None:
            value = self.old.get(key)
            if value is not None:
                self.put(key, value)
        return value

    def put(self, key, value) -> None:
        if len(self.young) >= self.size:
            self.old, self.young = self.young, {}
        self.young[key] = value


def count_text(text: str, weights: tuple, family: str, memo=None) -> float:
    """Tokens of one text, as a fraction: they are rounded once, at the end."""
    if memo is None:
        return weigh(text, weights)
    key = (hash(text), len(text), family)
    value = memo.get(key)
    if value is None:
        value = weigh(text, weights)
        memo.put(key, value)
    return value


def weigh(text: str, weights: tuple) -> float:
    step = min(STEP, len(text) // PIECES)
    sample = text if step <= PIECE else "".join([text[i:i + PIECE] for i in range(0, len(text), step)])
    raw = sample.encode("utf-8", "replace")
    counts = features((b" " + raw).translate(CHARACTER_CLASSES), len(raw) != len(sample))    # the first word counts too
    total = sum([weight * count for weight, count in zip(weights, counts)])
    return total if sample is text else total * len(text) / len(sample)


def features(x: bytes, has_scripts: bool) -> list:
    """The 20 counts that WEIGHTS weighs, in its order, of a text whose bytes were replaced by their classes."""
    c = x.count
    found = [c(b" a") + c(b"!a") + c(b"\na") + c(b"0a") + c(b" A") + c(b"!A") + c(b"\nA") + c(b"0A"),
             c(b"aA"), c(b"aaaaaa"), c(b"AA"), c(b"!0") + c(b" 0") + c(b"a0") + c(b"\n0") + c(b"A0"), c(b"000"),
             c(b"!"), c(b" !") + c(b"a!") + c(b"\n!") + c(b"0!") + c(b"A!"), c(b"\n") - c(b"\n\n"), c(b"\n ")]
    return found + [c(script) for script in SCRIPTS] if has_scripts else found


SCRIPTS = (b"L", b"C", b"R", b"O", b"V", b"E", b"K", b"H", b"G", b"F")


def character_class(byte: int) -> str:
    """a-z, A-Z, digits, blanks, line ends, other ASCII; the lead bytes of UTF-8 by script, its continuation bytes as they are."""
    char = chr(byte)
    if byte < 0x80:
        return ("a" if char.islower() else "A" if char.isupper() else "0" if char.isdigit() else
                " " if char in " \t" else "\n" if char in "\r\n" else "!")
    return next(script for last, script in LEAD_BYTES if byte <= last)


LEAD_BYTES = ((0xbf, "\x80"), (0xc1, "O"), (0xcf, "L"), (0xd3, "C"), (0xd7, "O"), (0xdb, "R"), (0xdf, "O"), (0xe0, "V"),
              (0xe2, "E"), (0xe3, "K"), (0xe9, "H"), (0xec, "O"), (0xed, "G"), (0xef, "O"), (0xff, "F"))
CHARACTER_CLASSES = bytes(ord(character_class(byte)) for byte in range(256))

WEIGHTS = {    # least squares on relative error over 519 pieces of real text and eight tokenizers
    # words camel long6 upper2 digruns dig3 pun punruns nl nlsp L C R O V E K H G F
    "generic":  (.86, 1.53, .70, .42, 1.67, 1.59, .25, .30, .91, .65, 1.20, .29, .40, 1.55, .45, .69, .61, .71, .75, 1.72),
    "gpt":      (.83, 1.55, .83, .29, 1.56, 1.06, .25, .21, .81, .71, 1.20, .27, .38, 1.32, .39, .70, .69, .78, .74, 2.15),
    "gemma":    (1.03, 1.28, .00, .51, 1.51, 3.12, .18, .75, 1.10, .99, 1.20, .26, .40, 1.41, .31, .59, .43, .66, .69, .95),
    "qwen":     (.84, 1.49, .88, .38, 1.99, 3.02, .19, .27, .60, .77, 1.20, .34, .44, 1.39, 1.14, .67, .65, .68, .82, 1.54),
    "deepseek": (.85, 1.53, .66, .53, 1.44, .73, .26, .40, .96, .41, 1.20, .30, .44, 1.39, .68, .64, .66, .58, .83, 2.19),
    "llama":    (.83, 1.60, .89, .39, 1.62, .99, .23, .20, .58, .89, .50, .33, .47, 2.00, .64, .80, .64, .81, .79, 3.09),
    "mistral":  (.85, 1.52, .71, .65, 1.86, 3.18, .30, .25, .88, .56, .50, .30, .35, 2.00, .45, .99, .61, .97, .70, 4.45),
}
FAMILIES = (    # what a model's name says of its tokenizer; distilled models keep that of the smaller one, so deepseek is late
    ("qwen",     r"qwen|qwq"),
    ("llama",    r"llama"),
    ("gemma",    r"gemma|gemini"),
    ("mistral",  r"(mi|code|dev|magi)str[ai]l|mixtral|ministral|pixtral"),
    ("gpt",      r"gpt|codex|(^|[^a-z0-9])o[134]([^a-z0-9]|$)"),
    ("deepseek", r"deepseek"),
)


def weights_of(model: str) -> tuple:
    """(weights, name of the family); "generic" for a name that tells nothing."""
    name = str(model).lower()
    family = next((family for family, pattern in FAMILIES if re.search(pattern, name)), "generic")
    return WEIGHTS[family], family


def image_size(data: str):
    """(width, height) in pixels of a base64 PNG, JPEG, GIF or WebP; None if its head does not tell. Reads 192 kB at most."""
    import binascii
    try:
        head = binascii.a2b_base64(data[:262144][:len(data) // 4 * 4])
    except (ValueError, UnicodeError):
        return None
    size = next((find(head) for magic, find in IMAGE_SIZES if re.match(magic, head, re.S)), None)
    return size if size and all(size) else None


def jpeg_size(data: bytes):
    """Walks the segments (a few hundred at most) to the frame header: c0-cf but for c4, c8 and cc."""
    at = 2
    for _ in range(500):
        marker = data[at + 1:at + 2]
        if data[at:at + 1] != b"\xff" or not marker:
            return None
        if b"\xc0" <= marker <= b"\xcf" and marker not in b"\xc4\xc8\xcc":
            return number(data, at + 7, 2, "big"), number(data, at + 5, 2, "big")
        at += 1 if marker == b"\xff" else 2 + number(data, at + 2, 2, "big")    # ff may be repeated before a marker


def number(data: bytes, at: int, size: int, order="little") -> int:
    return int.from_bytes(data[at:at + size], order)


IMAGE_SIZES = (
    (rb"\x89PNG\r\n\x1a\n", lambda data: (number(data, 16, 4, "big"), number(data, 20, 4, "big"))),
    (rb"\xff\xd8",          jpeg_size),
    (rb"GIF8[79]a",         lambda data: (number(data, 6, 2), number(data, 8, 2))),
    (rb"RIFF....WEBPVP8 ",  lambda data: (number(data, 26, 2) & 0x3fff, number(data, 28, 2) & 0x3fff)),
    (rb"RIFF....WEBPVP8L",  lambda data: (1 + (number(data, 21, 4) & 0x3fff), 1 + (number(data, 21, 4) >> 14 & 0x3fff))),
    (rb"RIFF....WEBPVP8X",  lambda data: (1 + number(data, 24, 3), 1 + number(data, 27, 3))),
)


class Calibration:
    """What each model's own counts taught: a factor on the estimate, the median of the last nine lessons.

    A report teaches only when the raw estimate is at least 1,000 tokens and the two differ by less than 2x: small turns are
    all overhead, and a count that is far off counts something else (a cache, an image).
    """
    LESSONS, MODELS, LEAST, RANGE = 9, 256, 1000, 2

    def __init__(self):
        self.lessons = {}    # model -> the newest ratios of real / raw

    def factor(self, model: str) -> float:
        lessons = sorted(self.lessons.get(model, (1.0,)))
        median = (lessons[(len(lessons) - 1) // 2] + lessons[len(lessons) // 2]) / 2
        return min(max(median, 1 / self.RANGE), self.RANGE)

    def learn(self, model: str, raw_estimate: int, real: int) -> bool:
        """True if the report taught something. The new list replaces the old one, so readers need no lock."""
        if raw_estimate < self.LEAST or not raw_estimate / self.RANGE < real < raw_estimate * self.RANGE:
            return False
        if model not in self.lessons and len(self.lessons) >= self.MODELS:
            self.lessons.pop(next(iter(self.lessons)), None)
        self.lessons[model] = (self.lessons.get(model, []) + [round(real / raw_estimate, 4)])[-self.LESSONS:]
        return True

    def dump(self) -> dict:
        return dict(self.lessons)

    def load(self, data) -> None:
        """Takes what dump() gave; entries that are damaged are left out."""
        if isinstance(data, dict):
            self.lessons = {model: ratios[-self.LESSONS:] for model, ratios in list(data.items())[-self.MODELS:]
                            if isinstance(ratios, list) and ratios
                            and all(type(r) in (int, float) and 0 < r < 1e6 for r in ratios)}


# === 8. State =======================================================================

HOME_FOLDER = ".claude-code-router"
LOG_BYTES, LOG_FILES = 10 << 20, 5      # a log file is full at the first; the newest of the second are kept
QUEUE_BYTES = 16 << 20                  # of log lines may wait for a slow disk; what does not fit is dropped and counted
CODE_MODULE = "ccr_custom"
TURN_KEYS = ("time", "request_id", "session", "asked", "provider", "model", "rule", "reason", "status", "first_ms", "ms",
             "input_tokens", "cached_tokens", "output_tokens", "fallbacks", "error")    # stand in each turn's line
SAVE_S = 60                             # how often learned things are saved
OVERRIDE_S, MISS_S = 2, 0.5             # how long a session's own Router is kept, and that it has none (yet: Claude Code
                                        # makes the file that shows its project after its first turn)
BACKUPS = 3


class State:
    """What outlives a turn: config, logs, counters, what was learned. Usable from every thread; never fails for the disk's sake.

    folder: where logs and calibration go, None is nowhere. echo(text): told all that is logged except turns.
    """

    def __init__(self, config, config_path, folder, env, echo=None):
        self.config_path, self.folder, self.env, self.echo = config_path, folder, env, echo
        self.upstream = None                        # the Server puts its connections here
        self.counts, self.last_error = {"requests": 0, "errors": 0}, None
        self.turns, self.turn_count, self.watchers = collections.deque(maxlen=500), 0, threading.Condition()
        self.under_way = {}                         # request id -> the turn
        self.rests, self.calibration = Rests(), Calibration()
        self.busy, self.busy_lock = collections.defaultdict(collections.Counter), threading.Lock()
        self.usage_by_session, self.seen_ids = Bounded(1000), Bounded(5000)
        self.overrides, self.told = Bounded(1000), Bounded(100)
        self.logs = LogWriter(os.path.join(folder, "logs")) if config.log and folder else None
        self.reloading, self.secrets = threading.Lock(), set()
        self.adopt(config)
        self.load_calibration()

    # the configuration

    def adopt(self, config) -> None:
        """Takes over a config and the files it names; turns under way go on with the config they began with."""
        self.keep_secret(*real_secrets(config))     # beside the old ones: a turn under way may still show them
        self.level = LOG_LEVELS.index(config.log_level)
        self.stamps = self.seen = self.adopted = self.look(config)
        self.custom_router = self.load("CUSTOM_ROUTER_PATH", config.custom_router_path, self.read_route)
        self.custom_transformers = self.load_transformers(config)
        self.rewrite_text = self.load("REWRITE_SYSTEM_PROMPT", config.rewrite_system_prompt, read_text)
        self.overrides.clear()
        self.config = config

    def keep_secret(self, *secrets) -> None:
        """From now on nothing shows these."""
        self.secrets |= set(secrets)
        self.scrub = scrubber(self.secrets)

    def reload(self) -> list:
        """Takes over the config file as it is now; returns the keys that need a restart. ConfigError: all stays as it was."""
        with self.reloading:
            if stamp(self.config_path) is None:
                raise ConfigError(["%s: there is no such file" % self.config_path])
            new, old = load_config(self.config_path, self.env), self.config
            if not new.apikey and not is_loopback(old.host):
                raise ConfigError(["APIKEY: without one ccr cannot go on listening on %s; restart it" % old.host])
            held = [key for key in ("HOST", "PORT", "LOG") if old.raw.get(key) != new.raw.get(key)]
            self.adopt(new._replace(host=old.host, port=old.port, log=old.log))
            for words in new.warnings:
                self.log("warn", words)
            self.log("info", "config reloaded" + ("; %s needs a restart" % " and ".join(held) if held else ""))
            return held

    def try_reload(self) -> None:
        """As reload; but a config with faults is told in the log and ignored."""
        try:
            self.reload()
        except ConfigError as e:
            self.stamps = self.look(self.config)
            self.log("error", "the changed config is ignored: " + "; ".join(e.problems))

    def look(self, config) -> list:
        """What shows whether the config or a file that it names has changed."""
        named = (config.custom_router_path, config.rewrite_system_prompt, *(entry["path"] for entry in config.transformers))
        return [stamp(path) for path in (self.config_path, *(self.full_path(path) for path in named if path))]

    def tick(self) -> None:
        """Called twice a second: takes over a config that has changed and is not just being written; saves what was learned."""
        before, self.seen = self.seen, self.look(self.config)
        if self.config.watch and before == self.seen != self.stamps:
            self.try_reload()
        if time.monotonic() > self.save_at:
            self.save_calibration()

    def full_path(self, path) -> str:
        return os.path.join(os.path.dirname(self.config_path), os.path.expanduser(path))

    # files that routing depends on

    def load(self, key, path, read):
        """read(path) of a file that the config names; None, and a line in the log, if it cannot be used."""
        try:
            return read(self.full_path(path)) if path else None
        except (Exception, SystemExit) as e:        # whatever the owner's code raises
            self.log("error", "%s: %s is not used: %s: %s" % (key, path, type(e).__name__, e))

    def read_route(self, path):
        """The `route` function of the owner's custom router."""
        route = run_file(path, self.config_path).get("route")
        if not callable(route):
            raise TypeError("it has no function route(request, config, info)")
        return route

    def load_transformers(self, config) -> dict:
        """{lower-case name: class} of the classes that the files of transformers[].path define; their options are the entry's."""
        found = {}
        for i, entry in enumerate(config.transformers):
            def read(path):
                return own_transformers(run_file(path, self.config_path), entry["options"], entry["path"])
            found.update(self.load("transformers[%d].path" % i, entry["path"], read) or {})
        return found

    def override(self, session) -> dict:
        """The Router keys of the session's own: its project's, and above them its own."""
        if not session or not SESSION_NAME.fullmatch(session):    # it becomes part of a file's name
            return {}
        until, found = self.overrides.get(session, (0, {}))
        if time.monotonic() > until:
            found = self.load_override(session)
            self.overrides[session] = (time.monotonic() + (OVERRIDE_S if found else MISS_S), found)
        return found

    def load_override(self, session) -> dict:
        found, folder = {}, os.path.join(home_of(self.env), HOME_FOLDER)
        for project in folders_in(folder):
            if not os.path.exists(os.path.join(home_of(self.env), ".claude", "projects", project, session + ".jsonl")):
                continue
            for path in (os.path.join(folder, project, name) for name in ("config.json", session + ".json")):
                try:
                    found.update(parse_override(parse_json5(read_text(path)), self.config, self.env))
                except FileNotFoundError:
                    pass
                except (OSError, ValueError, ConfigError) as e:
                    if self.told.put(path, stamp(path)) == stamp(path):
                        continue    # once for each state of the file
                    self.log("error", "%s is ignored: %s" % (path, str(e).replace("\n", "; ")))
        return found

    # turns

    def turn(self, record: dict) -> None:
        """One finished turn: into the log, the counters and the ring that the page shows; watchers wake up."""
        record = scrubbed({**dict.fromkeys(TURN_KEYS), **record, "time": iso_time(record.get("time"))}, self.scrub)
        error = record.get("error")
        level = "error" if error else "info"
        with self.watchers:
            self.counts["requests"] += 1
            self.counts["errors"] += bool(error)
            if error:
                self.last_error = "%s %s: %s" % (record["time"], record.get("model") or "request", error)
            self.turns.append(record)
            self.turn_count += 1
            self.watchers.notify_all()
        if self.logs is not None and self.wants(level):
            self.logs.add({"time": record["time"], "level": level, **record})

    def remember_usage(self, session, tokens) -> None:
        self.usage_by_session[session] = tokens

    def is_new_id(self, id) -> bool:
        """True the first time that a message id is seen."""
        return self.seen_ids.put(id, True) is None

    def wants(self, level) -> bool:
        """Whether lines of this level are logged: ask before collecting what is dear."""
        return LOG_LEVELS.index(level) <= self.level

    def log(self, level, message, **fields) -> None:
        """One line in the log, scrubbed. Never raises, never waits for the disk."""
        if not self.wants(level):
            return
        line = scrubbed({"time": iso_time(), "level": level, "message": message, **fields}, self.scrub)
        if self.logs is not None:
            self.logs.add(line)
        if self.echo is not None and level not in ("debug", "trace"):
            words = [line["message"] if level == "info" else "%s: %s" % (level, line["message"])]
            self.echo(" ".join(words + [str(line[key]) for key in fields]))

    # what was learned

    def load_calibration(self) -> None:
        path, self.save_at = self.folder and os.path.join(self.folder, "calibration.json"), time.monotonic() + SAVE_S
        try:
            if path:
                self.calibration.load(json.loads(read_text(path)))
        except FileNotFoundError:
            pass
        except (OSError, ValueError, RecursionError) as e:
            self.log("warn", "calibration.json cannot be used and will be replaced: %s" % e)
        self.saved = json.dumps(self.calibration.dump())

    def save_calibration(self) -> None:
        text, self.save_at = json.dumps(self.calibration.dump()), time.monotonic() + SAVE_S
        if self.folder and text != self.saved:
            try:
                save_file(os.path.join(self.folder, "calibration.json"), text)
                self.saved = text
            except OSError as e:
                self.log("warn", "calibration.json cannot be saved: %s" % e)

    def close(self) -> None:
        """Saves what was learned, and gives the log a moment to be written."""
        self.save_calibration()
        if self.logs is not None:
            self.logs.close()


class Bounded(dict):
    """A dict that forgets what was set longest ago when it has more than `size` keys; put() is safe between threads."""

    def __init__(self, size):
        super().__init__()
        self.size, self.lock = size, threading.Lock()

    def put(self, key, value):
        """Sets the key; returns what it was before, or None."""
        with self.lock:
            before = self.pop(key, None)
            super().__setitem__(key, value)
            if len(self) > self.size:
                del self[next(iter(self))]
            return before

    __setitem__ = put


# --- the folder and the files in it

def home_of(env) -> str:
    return os.path.abspath(env.get("HOME") or os.path.expanduser("~"))


def state_folders(env) -> list:
    """The places for PID file, lock and logs, best first: (path, whether nobody else may even read it)."""
    shared = os.path.join(env.get("TMPDIR") or "/tmp", "ccr-%d" % os.geteuid())
    runtime = [(os.path.join(env["XDG_RUNTIME_DIR"], "ccr"), True)] if env.get("XDG_RUNTIME_DIR") else []
    return [(os.path.join(home_of(env), HOME_FOLDER), False), *runtime, (os.path.abspath(shared), True)]


def find_folder(env, may_make=True) -> tuple:
    """(the first state folder that can be written and is safe, a warning if it is not the first of all); (None, warning)."""
    faults = []
    for path, is_private in state_folders(env):
        fault = folder_fault(path, is_private, may_make)
        if not fault:
            return path, "; ".join(faults + ["PID file and logs go to " + path]) if faults else None
        faults.append("%s: %s" % (path, fault))
    return None, "; ".join(faults + ["ccr goes on without PID file and logs"])


def folder_fault(path, is_private, may_make):
    """Why this is no good state folder, or None. If it is missing it is made for its owner only, or could be made."""
    try:
        if not os.path.lexists(path):
            if not may_make:
                return None if os.access(os.path.dirname(path), os.W_OK | os.X_OK) else "cannot be made"
            os.mkdir(path, 0o700)
        info = os.lstat(path) if is_private else os.stat(path)
    except FileExistsError:
        return folder_fault(path, is_private, may_make)    # another ccr has just made it
    except OSError as e:
        return e.strerror
    if not os.path.isdir(path) or is_private and os.path.islink(path):
        return "is no folder"
    if info.st_uid != os.geteuid() and (is_private or info.st_uid != 0):
        return "belongs to another user"
    if info.st_mode & (0o077 if is_private else 0o002):
        return "is open to other users (mode %04o)" % (info.st_mode & 0o7777)
    return None if os.access(path, os.W_OK | os.X_OK) else "cannot be written"


def find_config(env, arg=None) -> str:
    """The path of the config file: `arg` (--config), else CCR_CONFIG, else the one at home."""
    chosen = arg or env.get("CCR_CONFIG")
    return os.path.abspath(os.path.expanduser(chosen)) if chosen else os.path.join(home_of(env), HOME_FOLDER, "config.json")


def load_config(path, env) -> Config:
    """The Config of a file; the demo's if it is the default one and missing. ConfigError with all faults."""
    try:
        text, mode = read_text(path), os.stat(path).st_mode
    except FileNotFoundError:
        if path != find_config({"HOME": home_of(env)}):
            raise ConfigError(["%s: there is no such file" % path]) from None
        return parse_config({}, env)
    except (OSError, ValueError) as e:
        raise ConfigError(["%s: cannot be read: %s" % (path, getattr(e, "strerror", None) or e)]) from None
    try:
        raw = parse_json5(text)
    except ConfigError as e:
        raise ConfigError(["%s: %s" % (path, problem) for problem in e.problems]) from None
    config = parse_config(raw, env, {*known_transformers(), *custom_names(raw, os.path.dirname(path))})
    if mode & 0o077 and any(secret in text for secret in config.secrets):
        config = config._replace(warnings=(*config.warnings, "%s holds keys and others can read it: chmod 600 %s" % (path, path)))
    return config


def custom_names(raw, folder) -> list:
    """The names in the files of transformers[].path, found without running them."""
    names = []
    try:
        for entry in raw["transformers"]:
            text = read_text(os.path.join(folder, os.path.expanduser(entry["path"])))
            names += re.findall(r"""^\s+name\s*=\s*["']([^"'\n]+)["']""", text, re.M)
    except (OSError, ValueError, TypeError, KeyError):
        pass    # parse_config or State.load says what is wrong with it
    return names


def save_config(path, text) -> None:
    """Replaces a config file at once or not at all; the three versions before it stay as backups. OSError if it cannot be,
    ValueError if the text could not be read again."""
    text.encode()
    target = os.path.realpath(path)
    if os.path.islink(path) and not target.startswith(os.path.realpath(home_of(os.environ)) + os.sep):
        raise PermissionError(errno.EPERM, "is a link that leads out of the home folder", path)
    make_folder(os.path.dirname(target))
    mode = 0o600
    if os.path.exists(target):
        mode &= os.stat(target).st_mode
        save_file("%s.%s.bak" % (target, re.sub("[:.]", "-", iso_time())), read_text(target))
        backups = names_in(os.path.dirname(target), re.escape(os.path.basename(target)) + r"\.\d{4}-[\dTZ-]+\.bak$")
        for name in backups[:-BACKUPS]:
            remove(os.path.join(os.path.dirname(target), name))
    save_file(target, text, mode)


def save_file(path, text, mode=0o600) -> None:
    """Writes a file whole or not at all, never through a link, never readable by others in between."""
    scratch = "%s.%s.tmp" % (path, os.urandom(6).hex())
    try:
        fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode | 0o200)
        with open(fd, "w", encoding="utf-8", errors="surrogateescape") as f:
            os.fchmod(fd, mode)
            f.write(text)
            f.flush()
            os.fsync(fd)
        os.replace(scratch, path)
    except OSError:
        remove(scratch)
        raise


def remove(path) -> None:
    """Removes a file if it is there and can be removed."""
    try:
        os.unlink(path)
    except OSError:
        pass


def read_text(path) -> str:
    """A file as text. OSError, or ValueError if it is not UTF-8."""
    with open(path, encoding="utf-8-sig") as f:
        return f.read()


def run_file(path, config_path) -> dict:
    """The names that a Python file defines. It is run only if it and the config that names it can be trusted."""
    for each in (config_path, path):
        with open(each, "rb") as f:
            info, source = os.fstat(f.fileno()), f.read()
        if info.st_uid not in (os.geteuid(), 0) or info.st_mode & 0o002:
            raise PermissionError("%s must belong to you or root, and not be writable by everyone" % each)
    sys.modules.setdefault("ccr", sys.modules[__name__])    # so that `from ccr import Transformer` finds the running program
    module = sys.modules[CODE_MODULE] = type(sys)(CODE_MODULE)
    module.__file__ = path
    exec(compile(source, path, "exec"), module.__dict__)    # these very bytes, which were checked
    return vars(module)


def make_folder(path) -> None:
    """Makes the folder, and those above it that are missing, for their owner only; os.makedirs does so for the last one alone."""
    if path and not os.path.isdir(path):
        make_folder(os.path.dirname(path))
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:    # another ccr has just made it
            if not os.path.isdir(path):
                raise


def names_in(folder, pattern) -> list:
    """The names in a folder that begin as the pattern says, sorted; none if there is no such folder, or it cannot be read."""
    try:
        return sorted(filter(re.compile(pattern).match, os.listdir(folder or "")))
    except OSError:
        return []


def folders_in(path) -> list:
    try:
        return [entry.name for entry in os.scandir(path) if entry.is_dir()]
    except OSError:
        return []


def stamp(path):
    """What changes whenever a file does; None if it is missing."""
    try:
        info = os.stat(path)
        return info.st_mtime_ns, info.st_size, info.st_ino
    except OSError:
        return None


# --- logs

def iso_time(at=None) -> str:
    """2026-11-25T17:20:47.123Z"""
    at = time.time() if at is None else at
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at)) + ".%03dZ" % (at % 1 * 1000)


def real_secrets(config) -> set:
    """The secret values without dummies: a key such as "lm-studio" is none when the provider is called so."""
    names = {named.name for provider in config.providers for named in (provider, *provider.models)}
    return set(config.secrets) - names


def scrubber(secrets):
    """A function text -> text with each of these, plain, JSON-escaped or URL-encoded, as ***."""
    from urllib.parse import quote, quote_plus
    in_json = [json.dumps(secret, ensure_ascii=is_ascii)[1:-1] for secret in secrets for is_ascii in (True, False)]
    in_urls = [code for secret in secrets for code in (quote(secret, ""), quote(secret), quote_plus(secret))]
    forms = sorted({*secrets, *in_json, *in_urls}, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, forms)))
    return (lambda text: pattern.sub("***", text)) if forms else (lambda text: text)


def scrubbed(value, scrub):
    """The value with every string in it scrubbed."""
    if isinstance(value, str):
        return scrub(value)
    if isinstance(value, dict):
        return {key: scrubbed(item, scrub) for key, item in value.items()}
    return [scrubbed(item, scrub) for item in value] if isinstance(value, (list, tuple)) else value


def log_files(folder) -> list:
    """The names of the log files in a folder, oldest first."""
    return names_in(folder, r"ccr-\d{14}(_\d+)?\.log$")


class LogWriter:
    """JSON lines in ccr-TIME.log files: queued, written by one thread, rotated. Nobody else ever waits for the disk."""

    def __init__(self, folder):
        self.folder, self.fd, self.path, self.dropped = folder, None, None, 0
        self.queue, self.wake, self.is_closing = collections.deque(), threading.Event(), False
        self.thread = threading.Thread(target=self.run, name="log", daemon=True)
        self.thread.start()

    def add(self, record: dict) -> None:
        line = encode_line(record)
        if len(self.queue) * len(line) < QUEUE_BYTES:    # as if all were as long: good enough, and takes no lock
            self.queue.append(line)
        else:
            self.dropped += 1
        self.wake.set()

    def close(self, seconds=2) -> None:
        """Writes what is queued, as far as that is possible in this time."""
        self.is_closing = True
        self.wake.set()
        self.thread.join(seconds)

    def run(self) -> None:
        while self.queue or not self.is_closing:
            self.wake.wait()
            self.wake.clear()
            while self.queue:
                self.write(self.queue.popleft())

    def write(self, line) -> None:
        try:
            if self.dropped:
                words = "%d log lines were lost: the disk was full or slow" % self.dropped
                write_all(self.open(), encode_line({"time": iso_time(), "level": "warn", "message": words}))
                self.dropped = 0
            write_all(self.open(), line)
        except OSError:
            self.dropped += 1

    def open(self) -> int:
        """A descriptor of a log file with room in it: the one at hand, else the newest if it is ours alone, else a new one."""
        if self.fd is not None:
            if has_room(self.fd):
                return self.fd
            os.close(self.fd)
            self.fd = None
        if not os.path.isdir(self.folder):
            os.mkdir(self.folder, 0o700)
        if os.path.islink(self.folder):
            raise PermissionError("%s is a link" % self.folder)
        new, fault = time.strftime("ccr-%Y%m%d%H%M%S", time.gmtime()), None
        for name in (*log_files(self.folder)[-1:], new + ".log", *("%s_%d.log" % (new, i) for i in range(1, 10))):
            self.path = os.path.join(self.folder, name)
            try:
                fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            except OSError as e:
                fault = e
                continue
            if has_room(fd):
                self.fd = fd
                break
            os.close(fd)
        if self.fd is None:
            raise fault or FileExistsError(self.path)
        for name in log_files(self.folder)[:-LOG_FILES]:
            remove(os.path.join(self.folder, name))
        return self.fd


def has_room(fd) -> bool:
    """Whether this is a log file of ours alone, still in its folder, and not full."""
    info = os.fstat(fd)
    is_ours = info.st_uid == os.geteuid() and info.st_mode & 0o170077 == 0o100000
    return is_ours and info.st_nlink > 0 and info.st_size < LOG_BYTES


def encode_line(record: dict) -> bytes:
    return json.dumps(record, separators=(",", ":"), default=repr).encode() + b"\n"


def write_all(fd, data) -> None:
    while data:
        data = data[os.write(fd, data):]


# === 9. Upstream ===================================================================

CONNECT_S = 15          # per address; a name that does not answer is tried no longer
IDLE_S = 60             # an unused connection is kept so long,
MAX_IDLE = 32           # and so many of them per host
END_S = 0.05            # what a provider gets to end its reply after the last event
MAX_HEAD = 1 << 16
MAX_REPLY = 64 << 20
READ_SIZE = 1 << 17
USER_AGENT = "ccr/" + VERSION
LOOPBACK = Pattern(r"^(localhost|127(\.\d{1,3}){3}|\[?::1\]?)$", re.I)


class ClientGone(BaseException):
    """The client has left: nobody is there to be told. No Exception, so that nothing on the way takes it for a fault."""


class Watch:
    """The one place that waits: for the provider, while it watches the client, the stop pipe and the clock.

    `sink` is flushed before each wait and may ping at each tick; `silence_s` is the time without progress after which the
    provider is given up. Raises ClientGone, or ApiError 504 (silence) and 503 (ccr is stopping).
    """

    def __init__(self, sink=None, stop_fd=None, silence_s=600.0):
        self.sink, self.silence_s, self.who = sink, silence_s, "the provider"
        self.poll = select.poll()
        self.client = sink.fileno() if sink is not None else None
        if self.client is not None:
            self.poll.register(self.client, RDHUP or select.POLLIN)
        self.stop_fd = stop_fd
        if stop_fd is not None:
            self.poll.register(stop_fd, select.POLLIN)
        self.progress()
        self.end = float("inf")    # the last moment of the whole turn

    def progress(self):
        """The provider has said something: its silence begins anew."""
        self.deadline = time.monotonic() + self.silence_s

    def wait(self, fd=None, mask=select.POLLIN, seconds=None, lane=None) -> bool:
        """True when `fd` is ready; without fd, False after `seconds`. With a Lane, it waits there (see DeltaLoop)."""
        if self.sink is not None:
            self.sink.flush()
            if time.monotonic() >= self.sink.next_tick:    # the provider may speak all the time, and yet nothing go out
                self.sink.tick(time.monotonic())
        until = float("inf") if seconds is None else time.monotonic() + seconds
        if fd is not None:
            self.poll.register(fd, mask)
        try:
            while True:
                now = time.monotonic()
                tick = self.sink.next_tick if self.sink is not None else now + 10
                ends = min(self.deadline, self.end, until)
                pause = max(0, min(tick, ends) - now)
                found = self.poll.poll(0 if lane else pause * 1000 + 1)
                if lane and not found:
                    found = lane.park(pause)
                if self._ready(found, fd):
                    return True
                now = time.monotonic()
                if now >= until:
                    return False
                if now >= self.deadline or now >= self.end:
                    raise ApiError(504, "%s was silent for %g s (API_TIMEOUT_MS)" % (self.who, self.silence_s), is_network=True)
                if self.sink is not None and now >= self.sink.next_tick:
                    self.sink.tick(now)
        finally:
            if fd is not None:
                self.poll.unregister(fd)

    def _ready(self, found, fd) -> bool:
        ready = False
        for which, mask in found:
            if which == fd:
                ready = True
            elif which == self.stop_fd:
                raise ApiError(503, "ccr is stopping; the answer was cut off")
            elif which == self.client:
                if mask & (RDHUP | select.POLLHUP | select.POLLERR) or self.sink.has_left():
                    raise ClientGone()
                self.poll.modify(self.client, 0)    # bytes of a next request: left alone, without spinning
        return ready


RDHUP = getattr(select, "POLLRDHUP", 0)    # Linux: the other side has closed; elsewhere by peeking


class Connection:
    """A socket to a provider that never blocks: all waiting is done by a Watch."""

    def __init__(self, key, sock):
        self.key, self.sock, self.is_reused, self.idle_since = key, sock, False, 0
        self.buffer = b""
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.is_tls = hasattr(sock, "pending")

    def send(self, data: bytes, watch: Watch) -> None:
        view, sent = memoryview(data), 0
        while sent < len(view):
            try:
                sent += self.sock.send(view[sent:sent + (1 << 20)])
            except BLOCKED:
                watch.wait(self.sock.fileno(), select.POLLIN | select.POLLOUT if self.is_tls else select.POLLOUT)

    def read(self, watch: Watch, lane=None) -> bytes:
        """What the socket has, b"" at its end."""
        if not (self.is_tls and self.sock.pending()):
            watch.wait(self.sock.fileno(), lane=lane)
        if self.buffer:    # what the lane has read, and left to us
            data, self.buffer = self.buffer, b""
            return data
        while True:
            try:
                return self.sock.recv(READ_SIZE)
            except BLOCKED:
                watch.wait(self.sock.fileno())

    def is_dead(self) -> bool:
        """Readable while idle: the provider has closed it, or sent something nobody asked for."""
        return bool(self.buffer) or is_readable(self.sock)

    def close(self) -> None:
        self.sock.close()


def blocked_errors():
    try:
        import ssl
        return BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError
    except ImportError:    # a Python built without ssl still serves http providers
        return BlockingIOError, InterruptedError


BLOCKED = (BlockingIOError, InterruptedError)    # and ssl's, once a Pool is there


def is_readable(sock) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


class Pool:
    """Connections to providers, kept for the next turn: at most 32 idle per host, for at most 60 s."""

    def __init__(self):
        global BLOCKED
        BLOCKED = blocked_errors()
        self.idle = collections.defaultdict(collections.deque)
        self.lock = threading.Lock()
        self.tls = None

    def take(self, key):
        """A live idle connection, or None."""
        while True:
            with self.lock:
                if not self.idle[key]:
                    return None
                connection = self.idle[key].pop()
            if time.monotonic() - connection.idle_since < IDLE_S and not connection.is_dead():
                connection.is_reused = True
                return connection
            connection.close()

    def give(self, connection) -> None:
        now, old = time.monotonic(), []
        connection.idle_since = now
        with self.lock:
            self.idle[connection.key].append(connection)
            for idle in self.idle.values():
                while idle and (len(idle) > MAX_IDLE or now - idle[0].idle_since > IDLE_S):
                    old.append(idle.popleft())
        for connection in old:
            connection.close()

    def connect(self, key, watch) -> Connection:
        """A fresh connection. key: (scheme, host, port, proxy URL or "")."""
        scheme, host, port, proxy = key
        sock = open_socket(split_host(proxy) if proxy else (host, port), watch)
        try:
            if scheme == "https":
                if proxy:
                    open_tunnel(Connection(key, sock), host, port, proxy, watch)
                sock = self._tls().wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
                shake_hands(sock, watch)
            return Connection(key, sock)
        except BaseException:
            sock.close()
            raise

    def _tls(self):
        with self.lock:
            if self.tls is None:    # making one costs 80 ms: once per process
                import ssl
                self.tls = ssl.create_default_context()
            return self.tls

    def close(self) -> None:
        with self.lock:
            for idle in self.idle.values():
                while idle:
                    idle.pop().close()


def look_up(address, watch) -> list:
    """What getaddrinfo says of (host, port). It may take minutes where a name server is silent: nobody waits so long for it."""
    if LOOPBACK.match(address[0]):    # no name server is asked
        return socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
    found = []

    def ask():
        with theirs:
            try:
                found.append(socket.getaddrinfo(*address, type=socket.SOCK_STREAM))
            except Exception as e:
                found.append(e)
    ours, theirs = socket.socketpair()
    with ours:
        threading.Thread(target=ask, daemon=True).start()
        wait_for(ours, select.POLLIN, watch)
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def open_socket(address, watch):
    """A connected socket that never blocks; OSError if none of the name's addresses can be reached."""
    error = OSError("the name has no address")
    for family, kind, protocol, _, place in look_up(address, watch):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setblocking(False)
            code = sock.connect_ex(place)
            if code == errno.EINPROGRESS:
                wait_for(sock, select.POLLOUT, watch)
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if not code:
                return sock
            error = OSError(code, os.strerror(code))
        except OSError as e:
            error = e
        except BaseException:
            sock.close()
            raise
        sock.close()
    raise error


def shake_hands(sock, watch) -> None:
    import ssl
    while True:
        try:
            return sock.do_handshake()
        except ssl.SSLWantReadError:
            wait_for(sock, select.POLLIN, watch)
        except ssl.SSLWantWriteError:
            wait_for(sock, select.POLLOUT, watch)


def wait_for(sock, mask, watch) -> None:
    if not watch.wait(sock.fileno(), mask, CONNECT_S):
        raise socket.timeout("timed out")


def split_host(url: str) -> tuple:
    from urllib.parse import urlsplit
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def proxy_auth(proxy: str) -> bytes:
    from urllib.parse import urlsplit, unquote
    parts = urlsplit(proxy)
    if parts.username is None:
        return b""
    import base64
    word = "%s:%s" % (unquote(parts.username), unquote(parts.password or ""))
    return b"Proxy-Authorization: Basic %s\r\n" % base64.b64encode(word.encode())


def open_tunnel(connection, host, port, proxy, watch) -> None:
    target = b"%s:%d" % (host.encode("idna"), port)
    connection.send(b"CONNECT %s HTTP/1.1\r\nHost: %s\r\n%s\r\n" % (target, target, proxy_auth(proxy)), watch)
    head = read_head(connection, watch)
    if head.split(b" ", 2)[1:2] != [b"200"]:
        said = head.split(b"\r\n")[0].decode("latin-1") or "it closed the connection"
        raise ConnectionError("the proxy refused the tunnel: " + said)


def proxy_for(host: str, config) -> str:
    """The proxy for a host: PROXY_URL of the config, else HTTPS_PROXY; none for loopback and NO_PROXY hosts."""
    env = os.environ
    proxy = config.proxy_url or env.get("HTTPS_PROXY") or env.get("https_proxy") or ""
    if not proxy or LOOPBACK.match(host):
        return ""
    for name in (env.get("NO_PROXY") or env.get("no_proxy") or "").replace(" ", "").split(","):
        if name == "*" or name and (host == name.lstrip(".") or host.endswith("." + name.lstrip("."))):
            return ""
    return proxy if "://" in proxy else "http://" + proxy


SMALL_READ = 1 << 14    # more at once than this is no stream that trickles


class DeltaLoop:
    """One thread in which the plain deltas of all streams go from socket to socket (Linux), until ccr stops.

    A stream that waits for its next delta is parked here, while its own thread sleeps until anything else comes. 200 threads that
    wake for each delta spend more time over the interpreter's lock than on the work.
    """

    def __init__(self):
        self.lock, self.lanes, self.epoll, self.is_over = threading.Lock(), {}, None, False    # lanes: by both of their sockets

    def is_running(self, stop_fd) -> bool:
        """Whether streams can be parked. Not where there is no epoll, or no thread to be had: then all goes the general way."""
        with self.lock:
            if self.epoll is None and hasattr(select, "epoll"):
                try:
                    epoll = select.epoll()
                    threading.Thread(target=self._run, args=(epoll, stop_fd), name="deltas", daemon=True).start()
                    self.epoll = epoll
                except (OSError, RuntimeError):
                    pass
            return self.epoll is not None

    def add(self, lane) -> None:
        with self.lock:
            self.lanes[lane.fd] = self.lanes[lane.client] = lane
            self.epoll.register(lane.fd, select.EPOLLIN)
            self.epoll.register(lane.client, select.EPOLLRDHUP)
            if self.is_over:
                lane.woken.release()

    def remove(self, lane) -> None:
        with self.lock:
            for fd in (lane.fd, lane.client):
                del self.lanes[fd]
                self.epoll.unregister(fd)

    def _run(self, epoll, stop_fd) -> None:
        if stop_fd is not None:
            epoll.register(stop_fd, select.EPOLLIN)
        while not self.is_over:
            for fd, mask in epoll.poll():
                lane = self.lanes.get(fd)
                if lane is not None:
                    lane.serve(fd, mask)
                elif fd == stop_fd:
                    with self.lock:
                        self.is_over, lanes = True, list(self.lanes.values())
                    for lane in lanes:
                        lane.serve(fd, mask)


class Lane:
    """The way of one stream's plain deltas through the DeltaLoop. Whoever deals with it holds its lock."""

    def __init__(self, loop, reply, shortcut, sink):
        self.loop, self.connection, self.watch, self.shortcut, self.sink = loop, reply.connection, reply.watch, shortcut, sink
        self.fd, self.client = self.connection.sock.fileno(), sink.fileno()
        self.lock, self.woken, self.found, self.sizes = threading.Lock(), threading.Semaphore(0), None, ChunkSizes()

    def park(self, seconds) -> list:
        """Sleeps until the stream needs its own thread: what poll() would have found, [] if that is to be seen by polling."""
        with self.lock:
            self.found = None
            self.loop.add(self)
        self.woken.acquire(timeout=seconds)
        with self.lock:
            if self.found is None:
                self.leave([])
        return self.found

    def leave(self, found) -> None:
        self.loop.remove(self)
        self.found = found

    def serve(self, fd, mask) -> None:
        """What the loop found: plain deltas are passed on, for all else the stream's own thread is woken."""
        with self.lock:
            if self.found is None and not (fd == self.fd and mask == select.EPOLLIN and self.carry()):
                self.leave([(fd, mask)] if fd == self.fd else [])
                self.woken.release()

    def carry(self) -> bool:
        """Passes on what the provider's socket has, if it is plain deltas and nothing else; if not, the thread finds it all."""
        connection, sock = self.connection, self.connection.sock
        try:
            connection.buffer = sock.recv(SMALL_READ)
            data, rest, left = take_chunks(connection.buffer, 0, self.sizes)
            spliced, end = self.shortcut.take(data, 0)
        except BLOCKED:
            return True
        except Exception:    # the stream's own thread meets it again
            return False
        if spliced is None or end < len(data) or rest or left != 0:
            return False
        connection.buffer = b""
        self.shortcut.pass_by(spliced)
        self.watch.progress()
        return self.sink.send_now(spliced.data) and not (connection.is_tls and sock.pending())


class Reply:
    """A provider's answer: status, headers (lower-case names), and its body once, as chunks."""

    def __init__(self, connection, pool, watch, head: bytes):
        self.connection, self.pool, self.watch = connection, pool, watch
        self.status, self.headers = parse_head(head)
        self.keep = self.headers.get("connection", "").lower() != "close" and head[:9] != b"HTTP/1.0 "
        self.framed, self.lane = self._framed(), None

    def chunks(self):
        """The body in pieces as they come, without framing and compression. Gives the connection back when all is read."""
        coding = self.headers.get("content-encoding", "identity").lower()
        if coding in ("identity", ""):
            return self.framed
        if coding in ("gzip", "x-gzip", "deflate"):
            return inflate(self.framed)
        raise ApiError(502, "the provider compressed its reply with %s although it was asked not to" % coding[:20])

    def read(self, limit=MAX_REPLY) -> bytes:
        pieces, size = [], 0
        for piece in self.chunks():
            size += len(piece)
            if size > limit:
                raise ApiError(502, "the provider's reply is larger than %d MB" % (limit >> 20))
            pieces.append(piece)
        return b"".join(pieces)

    def finish(self) -> None:
        """Reads what may still follow the end of a stream (mostly the last chunk), so that the connection can be used again."""
        self.watch, self.lane = Watch(silence_s=END_S), None
        try:
            for _ in self.framed:
                if time.monotonic() > self.watch.deadline:
                    break
        except ApiError:    # it does not come: then the connection is closed
            pass

    def close(self) -> None:
        """Ends the reply at once, whatever is still to come."""
        if self.connection is not None:
            self.connection.close()
            self.connection = None

    def _framed(self):
        length = self.headers.get("content-length")
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            yield from self._dechunk()
        elif length is not None:
            if not re.match(r"^[0-9]{1,15}$", length):
                raise ApiError(502, "the provider sent a bad content-length: %.40s" % length)
            yield from self._counted(int(length))
        else:
            self.keep = False
            yield from iter(self._more, b"")
        self._done()

    def _more(self, lane=None) -> bytes:
        connection = self.connection
        if connection.buffer:
            data, connection.buffer = connection.buffer, b""
            return data
        try:
            return connection.read(self.watch, lane)
        except OSError as e:
            raise ApiError(502, "the provider broke the connection in the middle of its reply: %s" % (e.strerror or e))

    def _counted(self, left):
        while left:
            data = self._more()
            if not data:
                raise ApiError(502, "the provider's reply ended %d bytes too early" % left)
            if len(data) > left:
                self.connection.buffer, data = data[left:], data[:left]
            left -= len(data)
            yield data

    def _dechunk(self):
        """Chunks out of their framing, as far as they are there; all that came in one read are given together."""
        buffer, left, sizes = b"", 0, ChunkSizes()
        while True:
            is_small = len(buffer) < SMALL_READ
            data, buffer, left = take_chunks(buffer, left, sizes)
            if data:
                yield data
            if left is None:
                return self._trailers(buffer)
            is_trickle = self.lane and is_small and not (buffer or left) and self.lane.shortcut.may_pass()
            more = self._more(self.lane if is_trickle else None)
            if not more:
                raise ApiError(502, "the provider closed the connection in the middle of its reply")
            buffer += more

    def _trailers(self, rest):
        while not (rest.startswith(b"\r\n") or b"\r\n\r\n" in rest or rest.startswith(b"\n")):
            more = self._more()
            if not more or len(rest) > MAX_HEAD:
                self.keep = False
                return
            rest += more
        end = rest.find(b"\r\n\r\n") + 4 if not rest.startswith((b"\r\n", b"\n")) else rest.find(b"\n") + 1
        self.connection.buffer = rest[end:]

    def _done(self):
        connection, self.connection = self.connection, None
        if self.keep and not connection.buffer:
            self.pool.give(connection)
        else:
            connection.close()


class ChunkSizes(dict):
    """A chunk's size line -> the size; the same few come again and again."""

    def __missing__(self, line):
        match = re.match(rb"^([0-9a-fA-F]{1,8})[ \t]*(?:;[^\r]*)?\r?$", line)
        if not match:
            raise ApiError(502, DAMAGED)
        size = int(match.group(1), 16)
        if len(line) < 6:    # others are seldom the same
            self[line] = size
        return size


def take_chunks(buffer: bytes, left, sizes) -> tuple:
    """(the data of the chunks as far as they are there, the rest of the buffer, what is left of a chunk that is cut).

    What is left counts the chunk's line end; it is None after the last chunk. Raises ApiError(502).
    """
    start, parts = 0, []
    if left:
        start = min(len(buffer), left - 2) if len(buffer) < left else left
        parts.append(buffer[:min(start, left - 2)])
        if start == left and buffer[left - 2:left] != b"\r\n":
            raise ApiError(502, DAMAGED)
        left -= start
    if not left and len(buffer) > SMALL_READ:
        whole, start = whole_chunks(buffer, start, sizes)
        parts.append(whole)
    while not left:
        end = buffer.find(b"\n", start)
        if end < 0:
            if len(buffer) - start > 4096:
                raise ApiError(502, DAMAGED)
            break
        size = sizes[buffer[start:end]]
        if not size:
            return b"".join(parts), buffer[end + 1:], None
        start, after = end + 1, end + 1 + size
        if after + 2 > len(buffer):
            parts.append(buffer[start:after])
            left = size + 2 - len(parts[-1])
            start += len(parts[-1])
        elif buffer[after:after + 2] == b"\r\n":
            parts.append(buffer[start:after])
            start = after + 2
        else:
            raise ApiError(502, DAMAGED)
    return b"".join(parts), buffer[start:], left


SIZE_LINES = Pattern(rb"\r\n([0-9a-fA-F]{1,8})\r\n")


def whole_chunks(buffer: bytes, start, sizes) -> tuple:
    """(the data of the chunks from `start` but for the last, where that begins): all at once, if each is as long as it says.

    (b"", start) if not: a chunk is cut, or the data looks like framing.
    """
    before, *pieces = SIZE_LINES.split(b"\r\n" + buffer[start:])
    told, found = [sizes[line] for line in pieces[:-2:2]], pieces[1:-2:2]
    if before or not all(told) or told != list(map(len, found)):
        return b"", start
    return b"".join(found), start + sum(map(len, pieces[:-2])) + 4 * len(found)


DAMAGED = "the provider's chunked reply is damaged"


def inflate(chunks):
    """The pieces uncompressed, at most READ_SIZE at a time; damaged data is an error."""
    import zlib
    engine = zlib.decompressobj(47)
    try:
        for chunk in chunks:
            while chunk:
                piece = engine.decompress(chunk, READ_SIZE)
                chunk = engine.unconsumed_tail
                if piece:
                    yield piece
        yield engine.flush()
    except zlib.error as e:
        raise ApiError(502, "the provider's compressed reply is damaged: %s" % e)
    if not engine.eof:
        raise ApiError(502, "the provider's compressed reply ended too early")


def parse_head(head: bytes) -> tuple:
    """(status, headers) of a reply's head; ApiError(502) for what is not HTTP."""
    lines = head.split(b"\r\n") if b"\r\n" in head else head.split(b"\n")
    match = re.match(rb"^HTTP/1\.[01] ([1-5][0-9]{2})(?: |$)", lines[0])
    if not match:
        raise ApiError(502, "the provider does not speak HTTP: %s" % lines[0][:80].decode("latin-1"))
    headers = {}
    for line in lines[1:]:
        name, colon, value = line.partition(b":")
        name, value = name.strip().lower().decode("latin-1"), value.strip().decode("latin-1")
        if name == "content-length" and headers.get(name, value) != value:
            raise ApiError(502, "the provider sent two different lengths")
        headers[name] = value
    return int(match.group(1)), headers


def read_head(connection, watch) -> bytes:
    """The head of the reply, without its blank line; interim (1xx) heads are passed over. b"" if there came nothing at all."""
    data = b""
    while True:
        end = re.search(rb"\r?\n\r?\n", data)
        if end:
            head, connection.buffer = data[:end.start()], data[end.end():]
            if re.match(rb"^HTTP/1\.[01] 1", head):
                data = connection.buffer
                continue
            return head
        if len(data) > MAX_HEAD:
            raise ApiError(502, "the provider's reply has a head of more than %d kB" % (MAX_HEAD >> 10))
        more = connection.read(watch)
        if not more:
            if data:
                raise ApiError(502, "the provider closed the connection in the middle of its reply")
            return b""
        data += more


def make_opener(pool):
    """urllib's opener with nothing in it but pooled HTTP: no redirects, no file:, no environment proxies."""
    from urllib import request as urllib_request

    class Pooled(urllib_request.BaseHandler):
        def http_open(self, request):
            return send_request(pool, request)
        https_open = http_open

    opener = urllib_request.OpenerDirector()
    opener.add_handler(Pooled())
    return opener


def send_request(pool, request) -> Reply:
    """Sends on a pooled connection, or a fresh one; once more on a fresh one if a pooled one gave nothing at all."""
    key, watch = request.pool_key, request.watch
    while True:
        connection = pool.take(key) or pool.connect(key, watch)
        try:
            connection.send(request.wire, watch)
            head = read_head(connection, watch)
            if head:
                return Reply(connection, pool, watch, head)
            connection.close()
            if not connection.is_reused:
                raise ConnectionError("the connection was closed before an answer came")
        except (BrokenPipeError, ConnectionResetError):
            connection.close()
            if not connection.is_reused:
                raise
        except BaseException:
            connection.close()
            raise


class Upstream:
    """Where requests to providers leave, and what this process has learned about them.

    One pool, one opener, and one place that turns foreign exceptions into ApiError. refused: (provider name, URL, model) ->
    parameters that a 400 named.
    """

    def __init__(self, keep_secret=lambda secret: None):
        self.keep_secret = keep_secret    # told each secret that is not of the config
        self.pool = Pool()
        self.opener = make_opener(self.pool)
        self.loop = DeltaLoop()
        self.lock = threading.Lock()
        self.refused = {}
        self.key_turns = collections.Counter()
        self.key_rests = {}
        self.google, self.google_lock = ("", 0), threading.Lock()    # (access token, until when)

    def keys(self, provider) -> list:
        """The provider's keys in the order to be tried: they take turns, those that rest come last. [None] without any."""
        if not provider.keys:
            return [self.google_token() if provider.format in ("vertex-gemini", "vertex-claude") else None]
        with self.lock:
            first = self.key_turns[provider.name] = (self.key_turns[provider.name] + 1) % len(provider.keys)
        keys = provider.keys[first - 1:] + provider.keys[:first - 1] if first else provider.keys[-1:] + provider.keys[:-1]
        now = time.monotonic()
        return sorted(keys, key=lambda key: self.key_rests.get((provider.name, key), 0) > now)

    def google_token(self):
        """An access token of this machine's gcloud, asked for anew twice in its hour; None where there is no gcloud."""
        import subprocess
        with self.google_lock:
            if time.monotonic() > self.google[1]:
                try:
                    done = subprocess.run(["gcloud", "auth", "print-access-token"], stdin=subprocess.DEVNULL, timeout=CONNECT_S,
                                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", errors="replace")
                except OSError:    # then the provider says what it misses
                    return None
                except subprocess.TimeoutExpired:
                    raise ApiError(504, "`gcloud auth print-access-token` said nothing for %d s" % CONNECT_S)
                if done.returncode:
                    raise ApiError(401, "the provider has no api_key, and `gcloud auth print-access-token` says: "
                                   + done.stderr.strip()[-300:])
                self.google = done.stdout.strip(), time.monotonic() + 1800
                self.keep_secret(self.google[0])
            return self.google[0]

    def rest_key(self, provider, key, error) -> None:
        self.key_rests[provider.name, key] = time.monotonic() + min(retry_seconds(error), 3600)

    def open(self, config, who, url, headers, body, watch) -> Reply:
        """The provider's reply, whatever its status. `who` is the provider's name in errors. Raises ApiError, ClientGone."""
        from urllib.request import Request
        watch.who = who
        watch.progress()
        try:
            request = Request(url, data=body, headers=headers, method="GET" if body is None else "POST")
            scheme, host, port = request.type, *split_host(url)
            proxy = proxy_for(host, config)
            request.pool_key, request.watch = (scheme, host, port, proxy), watch
            request.wire = encode_request(request, scheme, proxy, body)
            return self.opener.open(request)
        except (ApiError, ClientGone):
            raise
        except Exception as e:    # whatever urllib, ssl, idna and sockets can raise
            raise network_error(who, url, e)


def encode_request(request, scheme, proxy, body) -> bytes:
    target = request.full_url if proxy and scheme == "http" else request.selector
    lines = ["%s %s HTTP/1.1" % (request.get_method(), target), "Host: " + request.host]
    lines += ["%s: %s" % pair for pair in request.header_items()]
    if body is not None:
        lines.append("Content-Length: %d" % len(body))
    head = "\r\n".join(lines)
    if re.search(r"[\x00\n\x7f]|\r(?!\n)", head.replace("\r\n", "")):
        raise ValueError("a header or the URL holds control characters")
    extra = proxy_auth(proxy) if proxy and scheme == "http" else b""
    return head.encode("latin-1") + b"\r\n" + extra + b"\r\n" + (body or b"")


def network_error(who, url, e) -> ApiError:
    """What a user can do about a connection that failed."""
    from urllib.parse import urlsplit
    place = urlsplit(url).netloc.rpartition("@")[2]
    if isinstance(e, socket.timeout):
        return ApiError(504, "%s: no connection to %s within %d s" % (who, place, CONNECT_S), is_network=True)
    if isinstance(e, socket.gaierror):
        return ApiError(502, "%s: the host name %s cannot be resolved; check api_base_url and the network" % (who, place),
                        is_network=True)
    if isinstance(e, ConnectionRefusedError):
        return ApiError(502, "%s: connection refused by %s; is it running?" % (who, place), is_network=True)
    if type(e).__name__ == "SSLCertVerificationError":
        return ApiError(502, "%s: the TLS certificate of %s is not trusted: %s" % (who, place, getattr(e, "verify_message", e)),
                        is_network=True)
    if isinstance(e, OSError):
        return ApiError(502, "%s: the connection to %s failed: %s" % (who, place, e.strerror or e), is_network=True)
    return ApiError(502, "%s: the request to %s could not be made: %s" % (who, place, e), is_network=True)


def connect(state) -> Upstream:
    """The process's one Upstream."""
    if state.upstream is None:
        state.upstream = Upstream(state.keep_secret)
    return state.upstream


def open_json(state, provider, url, timeout_s=15):
    """The JSON that a provider gives at a URL of its own, asked with its key. ApiError for anything else."""
    headers = {"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": USER_AGENT,
               **provider.headers, **FORMATS[provider.format].auth(provider.keys[0] if provider.keys else None)}
    watch = Watch(silence_s=timeout_s)
    watch.end = time.monotonic() + timeout_s
    return read_json(provider.name, connect(state).open(state.config, provider.name, url, headers, None, watch))


def read_json(who, reply):
    """The JSON of a reply, which is closed then; ApiError for anything else."""
    try:
        if reply.status >= 300:
            raise read_error(who, reply)
        return parse_json(reply.read(8 << 20), "the answer of " + who)
    finally:
        reply.close()


def read_error(who, reply) -> ApiError:
    """The provider's own words, with its status and Retry-After. A redirect is never followed: it would carry the key along."""
    if 300 <= reply.status < 400:
        from urllib.parse import urlsplit
        place = urlsplit(reply.headers.get("location", "")).netloc.rpartition("@")[2] or "another path"
        return ApiError(502, "%s redirects to %s, which is not followed; if that is right, write it in api_base_url"
                        % (who, place[:200]))
    error = parse_error(reply.status, reply.read(1 << 20), reply.headers)
    error.message = "%s answered %d: %s" % (who, reply.status, error.message)
    return error


# === 10. Exchange ==================================================================

FIRST_PING_S = 15       # silence after which the client gets headers and a first sign of life,
PING_S = 10             # and the pause between later ones
QUEUE_S = 30            # how long a turn waits for a free place at a provider (max_concurrent)
FALLBACK_S = 30         # what a turn may take beyond API_TIMEOUT_MS until somebody answers
MAX_REPAIRS = 3         # parameters that one request may lose because its provider refuses them


TOKENS = TokenMemo()    # a session sends the same texts again with each turn


def answer(turn) -> None:
    """One turn from end to end: route it, ask its targets in order until one begins to speak, pass the reply on."""
    fails = {}
    for provider, model in turn.choose_targets():
        try:
            events = primed(turn.ask(provider, model))
            break
        except ApiError as error:
            fails[provider.name, model] = error
            turn.close(is_whole=False)
            if not turn.may_go_on(error):
                raise turn.given_up(fails)
    else:
        error = turn.given_up(fails)
        error.is_final = len(fails) > 1 and all(e.status in PERMANENT and not e.is_network for e in fails.values())
        raise error
    turn.watch.end = float("inf")
    if turn.wants_stream:
        turn.sink.commit(turn.headers())
        for piece in turn.render(events):
            turn.sink.write(piece)
        turn.sink.end()
    else:
        message = fold(events)    # also of a relayed reply: its usage is for the log
        body = turn.relayed or turn.ingress.render_message(message, turn.request)
        turn.sink.respond(200, dump_json(body), turn.headers())


PERMANENT = (400, 401, 402, 403, 404)    # asking again will not help


def serve_turn(turn) -> None:
    """Answers a turn whatever happens: every failure reaches the client in its own format, every turn the log."""
    turn.state.under_way[turn.id] = turn
    try:
        answer(turn)
    except ClientGone:
        turn.status, turn.error = 499, "the client left"
    except Exception as e:
        turn.fail(told_error(turn.state, e))
    finally:
        turn.close()
        turn.state.under_way.pop(turn.id, None)
        turn.state.turn(turn.record())


def told_error(state, e) -> ApiError:
    """The error as the client is told it: no secrets in it, and a fault of our own only by its kind."""
    if isinstance(e, RecursionError):
        e = ApiError(400, "the request is nested too deeply")
    elif isinstance(e, ValueError) and str(e).startswith("Out of range float"):
        e = ApiError(502, "the provider's reply holds a number that JSON cannot tell: NaN or Infinity")
    elif not isinstance(e, ApiError):
        state.log("error", "a fault of ccr itself", error=repr(e), where=where_raised(e))
        e = ApiError(500, "ccr failed on this request (%s); its log says where" % type(e).__name__)
    e.message = state.scrub(e.message)
    return e


def where_raised(e) -> str:
    """'file:line function' of the innermost frames, for the log."""
    import traceback
    return " < ".join("%s:%d" % (f.name, f.lineno) for f in reversed(traceback.extract_tb(e.__traceback__)[-4:]))


class Exchange:
    """One turn under way: what was asked, who is asked, and what is to be told of it afterwards.

    ingress: the client's Format; body: its JSON; head: its headers, lower-case; sink: the client's side, None for ccr's own
    questions; config: the configuration as it was when the turn began.
    """

    def __init__(self, state, ingress, body, head, sink=None, stop_fd=None, config=None, memo_key=None, known=0):
        self.state, self.ingress, self.body, self.head, self.sink = state, ingress, body, head, sink
        self.config, self.upstream = config or state.config, connect(state)
        self.began, self.wall = time.monotonic(), time.time()
        self.id = new_id("req_")
        # under which MEMO_OF_TURNS has the body's messages, the first `known` checked before
        self.memo_key = memo_key
        self.request = ingress.parse_request(body, known) if known else ingress.parse_request(body)
        if ingress is not ANTHROPIC:
            self.request["x-created"] = int(self.wall)
        self.wants_stream = bool(self.request.get("stream"))
        self.watch = Watch(sink, stop_fd, self.config.timeout_s)
        self.watch.end = self.began + self.config.timeout_s + FALLBACK_S
        if sink is not None:
            sink.on_silence = self.commit_early if self.wants_stream else None
            sink.ping = ingress.ping
        self.session = session_of(head, self.request)
        self.replies, self.places, self.fallbacks, self.counts = [], [], [], {}
        self.route = self.target = self.first_at = self.relayed = self.early = None
        self.usage, self.status, self.error = {}, 200, None
        self.whole, self.searches = self.request, 0    # the request with its images; how often ccr searched the web for this turn

    # choosing

    def tokens(self, model=None) -> int:
        """The estimate of the request's tokens in the words of `model`, made once per model."""
        if model not in self.counts:
            add_up = self.memo_key and (lambda *call: MEMO_OF_TURNS.add_up(self.memo_key, *call))
            self.counts[model] = estimate_tokens(self.request, model or "", TOKENS, add_up)
        return int(self.counts[model] * self.state.calibration.factor(model or ""))

    def choose_targets(self) -> list:
        """The targets in the order to be asked; sets the route."""
        self.route = choose_route(self.turn(), self.config)
        if self.route.note:
            self.state.log("error", self.route.note)
        self.request = with_told_results(self.route.request)
        if self.state.rewrite_text:
            self.request = rewritten_system(self.request, self.state.rewrite_text)
        self.whole = self.request
        self.target = (self.route.provider, self.route.model)
        return self.state.rests.order([self.target, *self.route.fallbacks], time.monotonic())

    def turn(self) -> Turn:
        default = (self.config.router.get("default") or ("",))[0].partition(",")[2]
        return Turn(self.request, self.head, self.ingress.name, lambda: self.tokens(default),
                    self.state.usage_by_session.get(self.session, 0), self.session,
                    self.state.override(self.session) if self.config is self.state.config else {},    # not over a preset's
                    self.state.custom_router)

    def may_go_on(self, error) -> bool:
        """Whether another target may take over after this failure, which is noted."""
        provider, model = self.target
        now = time.monotonic()
        error.message = with_name(error.message, provider)
        self.state.rests.fail((provider.name, model), error, now)
        self.fallbacks.append({"model": "%s,%s" % (provider.name, model), "status": error.status,
                               "error": self.state.scrub(error.message)[:300]})
        is_other = (provider, model) != (self.route.provider, self.route.model)
        is_its_own = is_other and error.status < 500    # a wrong key, too small a window: no fault of the request
        return now < self.watch.end and (is_its_own or may_fall_back(error, self.route.is_listed))

    def given_up(self, fails) -> ApiError:
        """The error of the route's own model, if it was asked (a model that rests is asked last); the failure is then its own."""
        wanted = self.route.provider, self.route.model
        if (wanted[0].name, wanted[1]) not in fails:
            return next(iter(fails.values()))
        self.target = wanted
        return fails[wanted[0].name, wanted[1]]

    # asking

    def ask(self, provider, model):
        """The events of this target's reply. Raises ApiError before or between them."""
        self.target, before = (provider, model), self.request
        self.request = sighted(self, provider, model)
        if self.request is not before:
            self.counts = {}
        self.places.append(take_place(self.state, provider, model, self.watch))
        if provider.format == "demo":
            return self.watched(demo_events(self.request, self.writer(model)))
        return self.watched(searched(self, provider, model))

    def open_events(self, provider, model, request=None):
        """The events of one reply of the provider; request: what is asked instead of the turn's own."""
        call, self.shortcut = prepare(self, provider, model, request), None
        reply = send(self, call)
        self.replies.append(reply)
        chunks = reply.chunks()
        is_open = call.shortcut is not None and self.sink is not None and chunks is reply.framed
        if is_open and self.upstream.loop.is_running(self.watch.stop_fd):
            reply.lane = Lane(self.upstream.loop, reply, call.shortcut, self.sink)
        head = first_bytes(chunks)
        if head[:1] in (b"{", b"["):
            body = parse_json(b"".join([head, *chunks]), "the reply of " + provider.name)
            self.relay_buffer = None
            if call.is_relay and not self.wants_stream:
                self.relayed = body
                keep_items(as_dict(body).get("output"))
            yield from with_own_names(call.chain.events(self.told(call, body)), call.names)
            return
        if head[:1] == b"<":
            raise ApiError(502, "%s answered with a web page instead of a reply: check api_base_url (%s)"
                           % (provider.name, call.url))
        if not head:
            raise ApiError(502, "%s answered with nothing" % provider.name)
        shortcut = self.shortcut = call.shortcut
        frames = self.progressing(decode_sse(itertools.chain([head], chunks), shortcut), call.relay)
        events = call.chain.events(call.egress.parse_stream(frames, self.writer(model)))
        yield from with_own_names(events, call.names) if call.names else events

    shortcut = None

    def told(self, call, body):
        """The events of a JSON reply. That of a chat is a chunk to its parser: so transformers see broken arguments too."""
        if call.egress is OPENAI:
            is_counted = bool(as_dict(body).get("usage"))
            writer = BlockWriter(new_id("msg_"), call.model) if is_counted else self.writer(call.model)
            return OPENAI.parse_stream([dump_json(body)], writer)
        message = call.egress.parse_message(body)
        return unfold({**message, "model": message.get("model") or call.model})

    def progressing(self, frames, relay):
        """The frames, each of which is a sign of life; relayed ones go to the client as they are."""
        for frame in frames:
            self.watch.progress()
            if relay is not None:
                relay(frame)
            yield frame

    def writer(self, model) -> BlockWriter:
        return BlockWriter(new_id("msg_"), model, self.tokens(model))

    def watched(self, events):
        """The events on their way out: usage and times are noted, ids made unique, cut calls refused.

        The first word goes to the client at once; all that came with it in the same read follows in one send.
        """
        partial, is_first = None, self.sink is not None
        for event in events:
            if type(event) is Spliced:
                if partial is not None:
                    partial.append(json.loads(b'"' + event.body + b'"'))
                yield event
                continue
            if self.shortcut is not None:
                self.shortcut.saw(event)
            kind = event["type"]
            if kind == "content_block_delta":
                if partial is not None:
                    partial.append(event["delta"].get("partial_json") or "")
            elif kind == "content_block_start":
                self.first_at = self.first_at or time.monotonic()
                partial = [] if event["content_block"].get("type") == "tool_use" else None
            elif kind == "content_block_stop":
                if partial:
                    refuse_cut_call("".join(partial))
                partial = None
            elif kind == "message_start":
                self.usage = merge_usage(self.usage, event["message"].get("usage"))
                event = self.with_own_id(event)
            elif kind == "message_delta":
                self.usage = merge_usage(self.usage, event.get("usage"))
            yield event
            if is_first and kind == "content_block_delta" and partial is None:
                self.sink.flush()
                is_first = False

    def with_own_id(self, event):
        """A provider's id that was seen before is replaced: clients merge messages that share one."""
        id = event["message"].get("id")
        if not id or not self.state.is_new_id(id):
            id = new_id("msg_")
        return {**event, "message": {**event["message"], "id": id}}

    # answering

    def render(self, events):
        """The reply in the client's bytes."""
        if self.relay_buffer is not None:
            return self.drain_relay(events)
        if self.early is not None:
            events = (e for e in events if type(e) is Spliced or e["type"] != "message_start")
        return self.ingress.render_stream(events, self.request)

    relay_buffer = None

    def drain_relay(self, events):
        """The relayed frames; [DONE] as well where the provider left it out."""
        last = b""
        for _ in itertools.chain(events, [None]):
            for last in self.relay_buffer:
                yield last
            self.relay_buffer.clear()
        if self.ingress is OPENAI and last != DONE:
            yield DONE

    def headers(self) -> list:
        route, (provider, model) = self.route, self.target
        return [("request-id", self.id), ("x-ccr-route", header_text(route.rule)),
                ("x-ccr-model", header_text("%s,%s" % (provider.name, model))), ("x-ccr-reason", header_text(route.reason))]

    def commit_early(self) -> bytes:
        """What shows the client life when nothing came for long: headers, our own message_start, a ping."""
        self.sink.commit(self.headers())
        if self.ingress.name != "anthropic":
            return b""
        self.early, = BlockWriter(new_id("msg_"), self.target[1], self.tokens(self.target[1])).start()
        return encode_event(self.early)

    def fail(self, error) -> None:
        """Tells the client what went wrong, in its own format, with a real status as long as that is possible."""
        error.message = self.state.scrub(with_name(error.message, self.target and self.target[0]))
        self.status, self.error = error.status, error.message
        try:
            if self.sink.is_committed:
                error.message += " (status %d)" % error.status    # no status line can tell it now, and clients go by it
                self.sink.write(self.ingress.stream_error(error))
                self.sink.end()
            else:
                extra = self.headers() if self.route else [("request-id", self.id)]
                self.sink.respond(error.status, dump_json(self.ingress.render_error(error)), extra + error_headers(error))
        except ClientGone:
            self.status = 499

    def close(self, is_whole=True) -> None:
        """Ends what is still open upstream, and gives the places back."""
        for reply in self.replies:
            if is_whole and self.error is None and reply.connection is not None and reply.keep:
                reply.finish()
            reply.close()
        for place in self.places:
            place()
        self.replies, self.places = [], []

    def record(self) -> dict:
        """The turn as the log, the page and `ccr usage` see it."""
        provider, model = self.target or (None, None)
        usage, now = self.usage, time.monotonic()
        cached, written = usage.get("cache_read_input_tokens") or 0, usage.get("cache_creation_input_tokens") or 0
        total = (usage.get("input_tokens") or 0) + cached + written
        if self.error is None and model:
            self.state.rests.succeed((provider.name, model))
            if not self.searches:    # several requests are counted as one there
                self.learn(model, total)
        return {"time": self.wall, "request_id": self.id, "session": self.session, "ingress": self.ingress.name,
                "asked": self.body.get("model"), "provider": provider and provider.name, "model": model,
                "rule": self.route and self.route.rule, "reason": self.route and self.route.reason, "status": self.status,
                "error": self.error, "first_ms": self.first_at and round((self.first_at - self.began) * 1000),
                "ms": round((now - self.began) * 1000), "input_tokens": total, "cached_tokens": cached,
                "output_tokens": usage.get("output_tokens") or 0, "fallbacks": self.fallbacks, "stream": self.wants_stream}

    def learn(self, model, total) -> None:
        """What the model's own count teaches about the next estimate and about the session."""
        if self.counts.get(model) and total and self.usage.get("output_tokens"):    # else it is our own estimate
            self.state.calibration.learn(model, self.counts[model], total)
        if self.session and total:
            self.state.remember_usage(self.session, total)


def with_name(message, provider) -> str:
    """The message with the provider's name in it."""
    return re.sub(r"\bthe provider\b", lambda _: provider.name, message, count=1) if provider else message


def primed(events):
    """The events, pulled up to the first content: until then a failure is still a plain error, and another may take over."""
    held = []
    for event in events:
        held.append(event)
        if type(event) is Spliced or event["type"] in ("content_block_start", "message_delta"):
            break
    return itertools.chain(held, events)


def first_bytes(chunks) -> bytes:
    """The first chunks up to one that is not blank, with leading white space and byte order mark removed."""
    for chunk in chunks:
        chunk = chunk.lstrip(b"\xef\xbb\xbf \t\r\n")
        if chunk:
            return chunk
    return b""


def refuse_cut_call(text: str) -> None:
    """ApiError if the text is the beginning of a JSON value: half a command must not run.

    Arguments that are wrong in another way pass: the client tells the model, which mends them.
    """
    try:
        json.loads(text)
    except RecursionError:
        raise ApiError(502, "the model's tool call is nested too deeply")
    except json.JSONDecodeError as e:
        if e.msg.startswith("Unterminated string") or CUT_WORD.fullmatch(text[e.pos:].strip()):
            raise ApiError(502,
                           "the reply was cut off in the middle of a tool call's arguments (max_tokens?); the call was not run")


# in a word, in a number, in an escape of a string
CUT_WORD = Pattern(r"|t(r(ue?)?)?|f(a(l(se?)?)?)?|n(u(ll?)?)?|-|\.|[eE][-+]?|u[0-9a-fA-F]{0,4}")


def header_text(text) -> str:
    """Printable ASCII for a header; the rest is escaped."""
    return re.sub(r"[^ -~]", "?", str(text).encode("ascii", "backslashreplace").decode("ascii"))[:300]


def error_headers(error) -> list:
    headers = [("retry-after", header_text(error.retry_after))] if error.retry_after else []
    return headers + ([("x-should-retry", "false")] if error.is_final else [])


# --- One call of a provider

class Call(NamedTuple):
    """A request as it would be sent: everything but the key."""
    provider: object
    model: str
    egress: object
    chain: object
    url: str
    headers: dict
    body: dict
    is_relay: bool = False
    relay: object = None
    shortcut: object = None
    # (memo key, messages) when the memo renders the conversation, and `body` holds the system's messages only
    later: tuple = ()
    names: dict = {}       # {a tool's name: the shorter one that the provider knows}


def prepare(turn, provider, model, asked=None) -> Call:
    """The call of this target: the request fitted to the model's window, through the transformers, in the provider's format."""
    egress, chain = FORMATS[provider.format], Chain(provider, model, turn.state.custom_transformers)
    is_relay = egress is turn.ingress and egress.name != "anthropic" and not chain.needs_pivot
    is_relay = is_relay and (egress is OPENAI or knows_all(turn.body, model)) and turn.request is turn.whole and asked is None
    turn.relay_buffer = turn.relayed = None
    stream = {"stream": turn.wants_stream} if turn.wants_stream or "stream" in turn.request else {}    # Anthropic gets what came
    request = fit_request({**(asked or turn.request), "model": model, **stream}, provider, model,
                          lambda: turn.tokens(model))
    names = {} if is_relay or egress.name in ("anthropic", "vertex-claude") else short_names(request)
    request, later = chain.request(with_names(request, names) if names else request), ()
    is_plain = not chain.sees_requests and not any(key.startswith("x-") for key in request)
    if turn.memo_key and egress is OPENAI and not is_relay and is_plain:
        lead = leading_systems(request["messages"])
        request, later = {**request, "messages": request["messages"][:lead]}, (turn.memo_key, request["messages"][lead:])
    body = egress.render_request(request)
    if is_relay:
        body = {**turn.body, "model": model, **({"stream_options": body["stream_options"]} if "stream_options" in body else {})}
        own = {"messages": openai_own_message, "input": responses_own_item}
        body.update({key: list(map(clean, body[key])) for key, clean in own.items() if isinstance(body.get(key), list)})
    body = with_native_search(chain.body(body, request), turn, provider, model, asked or turn.request)
    headers = {"Content-Type": "application/json", "Accept": "text/event-stream" if turn.wants_stream else "application/json",
               "Accept-Encoding": "identity", "User-Agent": USER_AGENT, **anthropic_headers(turn, egress), **provider.headers}
    url = egress.endpoint(provider.url, model, turn.wants_stream)
    relay = shortcut = None
    if is_relay and turn.wants_stream:
        turn.relay_buffer = []
        relay = relay_frame(turn.relay_buffer, turn.ingress.name, bool((turn.body.get("stream_options")
                                                                        or {}).get("include_usage")))
    elif (SHORTCUT and asked is None and turn.ingress is ANTHROPIC and turn.wants_stream
          and egress.plain_delta and not chain.sees_events):
        shortcut = Shortcut(egress.plain_delta)
    return Call(provider, model, egress, chain, url, chain.headers(headers), body, is_relay, relay, shortcut, later, names)


def anthropic_headers(turn, egress) -> dict:
    """The client's anthropic-version and -beta for a provider that speaks the same; nothing else of the client's ever goes on."""
    if "anthropic" not in (egress.name, turn.ingress.name):
        return {}
    if egress.name == "anthropic":
        own = {"anthropic-version": turn.head.get("anthropic-version") or "2023-06-01",
               "anthropic-beta": turn.head.get("anthropic-beta")}
        return {name: value for name, value in own.items() if value and HEADER_VALUE.match(value)}
    return {}


HEADER_VALUE = Pattern(r"^[ -~]{1,4000}$")


DONE = b"data: [DONE]\n\n"


def relay_frame(out, ingress, wants_usage):
    """A function that puts a provider's frame into `out` as the client's: both ends speak the same format."""
    def relay(frame):
        value = parse_json(frame) if ingress == "responses" and frame != b"[DONE]" else {}
        if not wants_usage and ingress == "openai" and b'"usage"' in frame and not parse_json(frame).get("choices"):
            return    # the client did not ask for the chunk with usage alone: some fail on it
        if value.get("type") == "response.output_item.done":
            keep_items([value.get("item")])
        name = b"event: %s\n" % header_text(value["type"]).encode() if value.get("type") else b""
        out.append(name + b"data: %s\n\n" % frame.replace(b"\n", b"\ndata: "))
    return relay


def keep_items(items) -> None:
    """Remembers the items of a relayed Responses reply: some clients send back only their ids."""
    for item in dicts_in(items):
        if item.get("id"):
            KEPT.keep(item)


def send(turn, call) -> Reply:
    """The provider's good reply. Keys take turns, and a parameter that the provider refuses is left out and remembered."""
    upstream, refused = turn.upstream, []
    place = (call.provider.name, call.provider.url, call.model)
    if place in upstream.refused:
        call = whole(call)
    body, headers = call.body, call.headers
    for name in upstream.refused.get(place, ()):
        body, headers = without_parameter(body, headers, name)
    keys = upstream.keys(call.provider)
    if turn.state.wants("debug"):
        turn.state.log("debug", "request to the provider", request_id=turn.id, url=call.url, body=wire_body(call, body).decode())
    while True:
        key = keys[0]
        reply = upstream.open(turn.config, call.provider.name, call.url, {**headers, **call.egress.auth(key)},
                              wire_body(call, body), turn.watch)
        if 200 <= reply.status < 300:
            if refused:
                upstream.refused[place] = tuple(upstream.refused.get(place, ())) + tuple(refused)
            return reply
        try:
            error = read_error(call.provider.name, reply)
        finally:
            reply.close()
        name = unsupported_parameter(error.message) if error.status in (400, 422, 500) else None
        if error.status in (400, 422) and not name and "web_search_options" in body:    # OpenAI names it in other words
            name = "web_search_options"
        if name and call.later:
            call = whole(call)
            body = call.body
        if name and len(refused) < MAX_REPAIRS and without_parameter(body, headers, name) != (body, headers):
            body, headers = without_parameter(body, headers, name)
            refused.append(name)
        elif error.status in (401, 429) and len(keys) > 1:
            upstream.rest_key(call.provider, keys.pop(0), error)
        else:
            raise error


def wire_body(call, body) -> bytes:
    try:
        return encode_body(body, MEMO_OF_TURNS, *call.later) if call.later else dump_json(body)
    except ValueError:
        raise ApiError(400, "the request holds a number that JSON cannot tell: NaN or Infinity")


def whole(call) -> Call:
    """The call with its conversation in the body."""
    if not call.later:
        return call
    return call._replace(body={**call.body, "messages": call.body["messages"] + openai_messages(call.later[1], {})}, later=())


def take_place(state, provider, model, watch):
    """A place among the requests that the provider takes at once; returns the function that gives it back.

    Waits up to QUEUE_S for it, then ApiError(429), on which the turn falls back.
    """
    if not (provider.max_concurrent or provider.max_concurrent_models):
        return lambda: None
    busy = state.busy[provider.name]
    until = time.monotonic() + QUEUE_S
    while True:
        with state.busy_lock:
            models = set(busy) | {model}
            if (sum(busy.values()) < (provider.max_concurrent or 1 << 30)
                    and len(models) <= (provider.max_concurrent_models or 1 << 30)):
                busy[model] += 1
                return lambda: give_place(state, busy, model)
        if time.monotonic() > until:
            raise ApiError(429, "%s has no free place: max_concurrent or max_concurrent_models is reached" % provider.name,
                           retry_after="5")
        watch.wait(seconds=0.1)


def give_place(state, busy, model) -> None:
    with state.busy_lock:
        busy[model] -= 1
        if busy[model] <= 0:
            del busy[model]


def ask(state, provider, model, request, timeout_s=60) -> tuple:
    """(message, seconds to the first event) of a question of ccr's own. Raises ApiError."""
    turn = Exchange(state, ANTHROPIC, {"model": model, "max_tokens": 256, **request}, {})
    turn.watch.silence_s = timeout_s
    turn.watch.end = turn.began + timeout_s
    try:
        message = fold(turn.ask(provider, model))
        return message, (turn.first_at or time.monotonic()) - turn.began
    finally:
        turn.close()


# --- The demo model

DEMO_TEXT = """\
This is ccr, a proxy that lets Claude Code run on any language model. No provider is configured yet, so this built-in demo \
answers; everything between you and it is the real road.

You asked: %s

Three steps to a real model:
1. ccr init       looks for API keys and local servers, and proposes a configuration
2. edit           %s
3. ccr restart    and ask again
"""


def demo_events(request, writer):
    """A short text that says what ccr is, what was asked, and how to go on."""
    text = DEMO_TEXT % (" ".join(newest_prompt(request).split())[:300] or "(nothing)", "~/.claude-code-router/config.json")
    for word in re.findall(r"\S*\s*", text):
        yield from writer.text(word)
    yield from writer.finish("end_turn", {"output_tokens": len(text) // 4})


# --- The prefix memo: each turn of a session sends the whole conversation again

MEMO = True               # False parses and renders every request whole, for bisecting
MEMO_SESSIONS = 64
MEMO_BYTES = 1 << 14      # a smaller request is soon parsed
MEMO_CHARS = 64 << 20     # of request text kept, all sessions together
BLANKS = Pattern(r"[ \t\r\n]*")


class Remembered(NamedTuple):
    """A session's last request: its text, where the first message begins in it and each one ends, the messages, and the members
    after them: name -> (begin, end, value); what the messages were rendered to: id of a segment's first message -> (the segment,
    its bytes); and their tokens: family -> the count of each."""
    text: str = ""
    start: int = 0
    ends: list = []
    messages: list = []
    members: dict = {}
    rendered: dict = {}
    counts: dict = {}


class Memo:
    """Parses and renders only what is new in a session's request.

    Texts are compared, never values (1 == True == 1.0). Messages, tools and systems of the same text are the same objects in the
    next turn, so that what was made of them can be found by identity.
    """

    def __init__(self):
        self.sessions, self.size, self.lock = collections.OrderedDict(), 0, threading.Lock()

    def parse(self, raw: bytes, key):
        """(the body, how many of its first messages were seen in this session's last request); ApiError(400) as parse_body."""
        text = utf8_object(raw) if MEMO and key else None
        if text is None:
            return parse_body(raw), 0
        old = self.sessions.get(key, Remembered())
        try:
            new = scan_body(text, old)
        except (StopIteration, ValueError, RecursionError):
            new = None
        if new is None:
            return parse_body(raw), 0
        head, new, known = new
        counts = {family: counts[:known] for family, counts in old.counts.items()}
        self._keep(key, new._replace(rendered=old.rendered, counts=counts))
        return {**head, "messages": new.messages, **{name: value for name, (_, _, value) in new.members.items()}}, known

    def render(self, key, messages, render) -> list:
        """The rendered messages as bytes, one item per segment; render: segment -> bytes. Only for messages of parse()."""
        old, rendered, out = self.sessions.get(key), {}, []
        for segment in segments(messages):
            known = old.rendered.get(id(segment[0])) if old else None
            if known is None or len(known[0]) != len(segment) or any(a is not b for a, b in zip(known[0], segment)):
                known = segment, render(segment)
            rendered[id(segment[0])] = known
            if known[1]:
                out.append(known[1])
        if old is not None:
            self._keep(key, old._replace(rendered=rendered))
        return out

    def add_up(self, key, messages, family, count) -> float:
        """The sum of count(message), in which messages of parse() that were counted before are not counted again."""
        old = self.sessions.get(key)
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] is pair[1], zip(messages, old.messages))) if old else 0
        counts = old.counts.get(family, [])[:same] if old else []
        counts += map(count, messages[len(counts):])
        if old is not None and same == len(messages):
            old.counts[family] = counts
        return sum(counts)

    def _keep(self, key, new) -> None:
        with self.lock:
            old = self.sessions.pop(key, None)
            self.sessions[key] = new
            self.size += len(new.text) - (len(old.text) if old else 0)
            while len(self.sessions) > MEMO_SESSIONS or self.size > MEMO_CHARS:
                self.size -= len(self.sessions.popitem(last=False)[1].text)


MEMO_OF_TURNS = Memo()


def memo_key(raw: bytes, headers):
    """What tells a conversation from others: session and agent, or how it begins. None for a small body, which is soon parsed."""
    if len(raw) < MEMO_BYTES:
        return None
    return headers.get("x-claude-code-session-id") or raw[:2048], headers.get("x-claude-code-agent-id")


def parse_body(raw: bytes) -> dict:
    """The body as a JSON object; ApiError(400) if it is none."""
    try:
        value = json.loads(raw, parse_float=parse_number, parse_constant=parse_number)
    except RecursionError:
        raise ApiError(400, "the request's JSON is nested too deeply")
    except ValueError as e:
        raise ApiError(400, "the request is not JSON: %s" % str(e)[:200])
    if not isinstance(value, dict):
        raise ApiError(400, "the request must be a JSON object")
    return value


def parse_number(text: str) -> float:
    """A number that can be written as JSON again; ValueError for NaN, Infinity and what is larger than a float."""
    number = float(text)
    if number - number:
        raise ValueError("%s is a number that JSON cannot tell" % text[:40])
    return number


SCAN = json.JSONDecoder(parse_float=parse_number, parse_constant=parse_number).scan_once


def utf8_object(raw: bytes):
    """The text of a JSON object in UTF-8, or None."""
    if raw[:1] != b"{":
        return None
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return None


def scan_body(text: str, old: Remembered):
    """(the members before the messages, what is to be remembered, how many messages `old` had). None for a body with two lists of
    messages. Raises StopIteration or ValueError for one without, and for damaged JSON.
    """
    start, ends, messages = common_messages(text, old)
    start, known = start or find_messages(text), len(messages)
    head, at = SCAN(text[:start] + "]}", 0)[0], ends[-1] if ends else start
    while not is_next(text, at, "]"):
        message, at = SCAN(text, after(text, at, ",") if messages else at)
        messages.append(message)
        ends.append(at)
    members = scan_members(text, after(text, at, "]"), old)
    if "messages" in members or head.get("messages") != []:
        return None
    return head, Remembered(text, start, ends, messages, members), known


def common_messages(text: str, old: Remembered) -> tuple:
    """(where the list of messages begins, the ends of those that `text` begins with as `old` did, and they themselves)."""
    if not text.startswith(old.text[:old.start]):
        return 0, [], []
    at, count = old.start, 0
    for end in old.ends:
        if not text.startswith(old.text[at:end], at):
            break
        at, count = end, count + 1
    return old.start, old.ends[:count], old.messages[:count]


def find_messages(text: str) -> int:
    """Where the first message of a body may begin."""
    at, name = after(text, 0, "{"), None
    while name != "messages":
        name, at = SCAN(text, after(text, at, ",") if name else at)
        at = after(text, at, ":")
        if name != "messages":
            _, at = SCAN(text, at)
    return after(text, at, "[")


def scan_members(text: str, at, old: Remembered) -> dict:
    """The members of the body from `at`, after the messages, to its end: name -> (begin, end, value). A list or object of the
    same text as in `old` is the same object."""
    members = {}
    while is_next(text, at, ","):
        name, at = SCAN(text, after(text, at, ","))
        if type(name) is not str:
            raise ValueError("a name must be a string")
        at = after(text, at, ":")
        begin, end, value = old.members.get(name, (0, 0, None))
        if type(value) in (list, dict) and text.startswith(old.text[begin:end], at):
            end += at - begin
        else:
            value, end = SCAN(text, at)
        members[name] = at, end, value
        at = end
    if after(text, at, "}") != len(text):
        raise ValueError("something follows the body")
    return members


def is_next(text: str, at, mark) -> bool:
    return text.startswith(mark, BLANKS.match(text, at).end())


def after(text: str, at, mark) -> int:
    """Where the next value begins after this mark; ValueError if it is not there."""
    if not is_next(text, at, mark):
        raise ValueError("%s was expected" % mark)
    return BLANKS.match(text, text.index(mark, at) + 1).end()


def segments(messages):
    """The conversation cut before each assistant message that follows another role: what stands before such a cut is rendered
    the same whatever follows (calls and their results never stand on two sides of one)."""
    begin = 0
    for at in range(1, len(messages)):
        if messages[at]["role"] == "assistant" and messages[at - 1]["role"] != "assistant":
            yield messages[begin:at]
            begin = at
    yield messages[begin:]


def encode_body(body: dict, memo: Memo, key, messages) -> bytes:
    """The bytes of a chat completions body whose own messages are the system's; the conversation's come from the memo."""
    own = [dump_json(message) for message in body["messages"]]
    later = memo.render(key, messages, lambda segment: b",".join(map(dump_json, openai_messages(segment, {}))))
    known = {"messages": b"[%s]" % b",".join(own + later), "tools": encode_tools(body)}
    return b"{%s}" % b",".join(b"%s:%s" % (dump_json(name), known.get(name) or dump_json(value)) for name, value in body.items())


@remembered("tools")
def encode_tools(body: dict) -> bytes:
    return dump_json(body.get("tools"))


# --- Web search

# A request may offer Anthropic's server tool web_search: its calls are answered before the reply ends. The model searches by
# itself if it can (native_search); else ccr does, with the search engine of the config, whenever the model calls a function of
# that name (search_loop). ccr opens no address that a model or a result names: it only ever connects to the engine.

SEARCH_S = 15           # for one search
AT_ONCE = 8             # searches, or images, side by side; and rounds, where the client does not say max_uses
MAX_EXCERPT = 3000      # characters of a page that the model gets to read
DISTRUST_S = 3600       # a model that was to search and did not is not trusted with it again so soon
UNLINKED = Bounded(1000)        # (provider name, URL, model) -> when that was
OWN_EXCERPT = "ccr:"            # what our encrypted_content begins with
INNER_QUERY = Pattern(r"\s*Perform a web search for the query:\s*(\S.*)", re.DOTALL)    # how Claude Code's WebSearch asks
SEARCH_FUNCTION = {
    "description": "Searches the web: titles, addresses and excerpts of pages. Use it for what is recent or must be looked up.",
    "input_schema": {"type": "object", "required": ["query"],
                     "properties": {"query": {"type": "string", "description": "what to look for"}}}}
NO_SEARCH = ('nobody searched the web: add "WebSearch": {"engine": "tavily", "api_key": "..."} to config.json '
             "(or brave, ollama, searxng), or set Router.webSearch to a model that searches by itself")
TOO_MANY = "there were searches enough: answer with what is known now"


def searched(turn, provider, model):
    """The events of a reply, whoever makes the searches that it wants."""
    tools, egress = turn.request.get("tools") or [], FORMATS[provider.format]
    tool, is_only = next(filter(is_web_search, tools), None), all(map(is_web_search, tools))
    is_anthropic = by_host({"anthropic.com": True}, provider.url) or provider.format == "vertex-claude"
    if tool is None or is_anthropic or egress is turn.ingress and egress is not ANTHROPIC:
        return turn.open_events(provider, model)    # the service tells of its searches in the client's own format
    engine, place = search_engine(turn.config), (provider.name, provider.url, model)
    members = native_search(turn, provider, model, turn.request)
    if engine and (time.monotonic() - UNLINKED.get(place, -DISTRUST_S) < DISTRUST_S or members and not is_only):
        members = None                              # with members it would search in every turn, wanted or not
    if members is None and (engine or not is_only):
        return search_loop(turn, provider, model, tool, engine)
    events = checked_links(turn.open_events(provider, model), tool, is_only and not engine)
    if engine and is_only:
        return linked_or(events, place, lambda: search_loop(turn, provider, model, tool, engine))
    return events


def native_search(turn, provider, model, request):
    """What makes this model search by itself, as members of the body ({}: its format says it already); None if it cannot."""
    tool = next(filter(is_web_search, request.get("tools") or []), None)
    if tool is None or provider.format in ("gemini", "vertex-gemini") and functions_of(request):
        return None
    if provider.format != "openai":
        return {}
    domains = {key: value for key, value in zip(("include_domains", "exclude_domains"), domains_of(tool)) if value}
    if by_host({"openrouter.ai": True}, provider.url):
        return {"plugins": [{"id": "web", **domains}]}
    if by_host({"groq.com": True}, provider.url) and "compound" in model:
        return {"search_settings": domains} if domains else {}
    is_set = target_name((provider, model)) in targets_of(turn, "webSearch")
    refused = turn.upstream.refused.get((provider.name, provider.url, model), ())
    return {"web_search_options": {}} if is_set and "web_search_options" not in refused else None


def domains_of(tool) -> tuple:
    return strings_in(tool.get("allowed_domains")), strings_in(tool.get("blocked_domains"))


def targets_of(turn, route) -> tuple:
    """The targets of a key of Router, the session's own if it has some."""
    return {**turn.config.router, **turn.state.override(turn.session)}.get(route, ())


def with_native_search(body, turn, provider, model, request) -> dict:
    """The body that asks a model to search by itself, if the request wants a search and this model can."""
    members, own = native_search(turn, provider, model, request) or {}, dicts_in(body.get("plugins"))
    if any(plugin.get("id") == "web" for plugin in own):
        return body
    return {**body, **members, **({"plugins": own + members["plugins"]} if "plugins" in members else {})}


def opened(event) -> dict:
    """The block that an event opens, {} if none."""
    return event["content_block"] if type(event) is not Spliced and event["type"] == "content_block_start" else {}


def checked_links(events, tool, must_link):
    """The reply of a model that searches by itself, without links that the client does not allow; its searches are counted.
    If it brings no link though it must, it says at its end that nobody searched, and what to do about it."""
    index, count, is_told = -1, 0, False
    for event in events:
        block = opened(event)
        if block.get("type") == "web_search_tool_result":
            if isinstance(block.get("content"), list):
                block = {**block, "content": [link for link in dicts_in(block["content"]) if is_allowed(link, tool)]}
                event, count = {**event, "content_block": block}, count + bool(block["content"])
            is_told = is_told or bool(block.get("content"))
        elif type(event) is not Spliced and event["type"] == "message_delta":
            if count:
                event = {**event, "usage": {"server_tool_use": {"web_search_requests": count}, **(event.get("usage") or {})}}
            elif must_link and not is_told and event["delta"].get("stop_reason") != "refusal":
                id, is_told = new_id("srvtoolu_"), True
                use = {"type": "server_tool_use", "id": id, "name": "web_search", "input": {}}
                yield from whole_blocks(index + 1, [use, *result_blocks(id, ApiError(503, NO_SEARCH))])
        if type(event) is not Spliced:
            index = event.get("index", index)
        yield event


def linked_or(events, place, otherwise):
    """The reply if it brings links, told when it is whole; else the other one."""
    try:
        held = list(events)
    except ApiError as e:
        if e.status not in (400, 404, 422):
            raise
        held = []
    if any(opened(event).get("type") == "web_search_tool_result" and opened(event).get("content") for event in held):
        yield from held
    else:
        UNLINKED[place] = time.monotonic()
        yield from otherwise()


def whole_blocks(index, blocks):
    """The events of whole blocks, numbered from index."""
    for n, block in enumerate(blocks, index):
        first, deltas = unfold_block(block)
        yield {"type": "content_block_start", "index": n, "content_block": first}
        yield from ({"type": "content_block_delta", "index": n, "delta": delta} for delta in deltas)
        yield {"type": "content_block_stop", "index": n}


# ccr searches

def search_loop(turn, provider, model, tool, engine):
    """One reply of as many rounds as it takes: the model's searches are answered here and it is asked again, until it calls for
    nothing, or for something else too, which is the client's to answer. engine None: they are answered with what to configure."""
    name, limit, done, book = as_text(tool.get("name")) or "web_search", tool.get("max_uses"), 0, LoopBook()
    left = limit if type(limit) is int and limit > 0 else AT_ONCE
    tools = [{"name": name, **SEARCH_FUNCTION} if each is tool else each for each in turn.request["tools"]]
    request, wanted = {**turn.request, "tools": tools}, INNER_QUERY.match(newest_prompt(turn.request))
    while True:
        yield from book.read(turn.open_events(provider, model, request))
        calls = [block for block in book.calls if block["name"] == name]
        others = [block for block in book.calls if block["name"] != name]
        if wanted and not book.calls and not turn.searches:    # it was told to search and did not think of calling
            calls = [{"type": "tool_use", "id": new_id("toolu_"), "name": name, "input": {"query": wanted[1].strip()}}]
            book.content += calls
        uses = [{"type": "server_tool_use", "id": new_id("srvtoolu_"), "name": "web_search", "input": call["input"]}
                for call in calls]
        yield from book.tell(uses)
        results = {}
        for n, found in made_searches(turn, engine, tool, calls, AT_ONCE if left else 0):
            results[n], done = search_result(calls[n], found), done + (not isinstance(found, ApiError))
            yield from book.tell(result_blocks(uses[n]["id"], found))
        if others or not calls or not left:
            yield from book.tell(others)
            return (yield from book.end(bool(others), done))
        left -= 1
        request = {**request, "tool_choice": {"type": "auto" if left else "none"}, "messages": [
            *request["messages"], {"role": "assistant", "content": book.content},
            {"role": "user", "content": [results[n] for n in range(len(calls))]}]}


class LoopBook:
    """The rounds of a reply as one message: blocks numbered through, calls kept back, tokens added up."""

    def __init__(self):
        self.index, self.usage, self.is_started, self.last = -1, {}, False, {}
        self.content, self.calls = [], []        # of the round at hand

    def read(self, events):
        """Tells a round's text and thoughts as they come; keeps its calls and its end."""
        kept, numbers, arguments = [], {}, {}
        for event in events:
            kind, index, block = event["type"], event.get("index"), opened(event)
            if block.get("type") == "tool_use":
                arguments[index] = []
            elif index in arguments:
                arguments[index].append(as_dict(event.get("delta")).get("partial_json") or "")
                continue
            elif block:
                self.index = numbers[index] = self.index + 1
            kept.append(event)
            if index in numbers:
                yield {**event, "index": numbers[index]}
            elif kind == "message_delta":
                self.last, self.usage = event, added_usage(self.usage, event.get("usage") or {})
            elif kind == "ping" or kind == "message_start" and not self.is_started:
                self.is_started = True
                yield event
        self.content = fold(kept)["content"]
        self.calls = [block for block in self.content if block.get("type") == "tool_use"]
        for block, parts in zip(self.calls, arguments.values()):
            block["input"] = whole_input("".join(parts)) or block["input"]

    def tell(self, blocks):
        yield from whole_blocks(self.index + 1, blocks)
        self.index += len(blocks)

    def end(self, has_calls, searches) -> list:
        """The end of the message, which asks for a tool if the client has one to run."""
        delta, usage = as_dict(self.last.get("delta")), self.usage
        if has_calls or delta.get("stop_reason") == "tool_use":
            delta = {**delta, "stop_reason": "tool_use" if has_calls else "end_turn"}
        if searches:
            usage = {**usage, "server_tool_use": {"web_search_requests": searches}}
        return [{**self.last, "delta": delta, "usage": usage}, {"type": "message_stop"}]


def added_usage(one: dict, two: dict) -> dict:
    sums = {key: value + two.get(key, 0) for key, value in one.items() if is_count(value) and is_count(two.get(key, 0))}
    return {**two, **sums}


def whole_input(text: str) -> dict:
    """A call's arguments; those that are no JSON object travel as they are. ApiError if they were cut off."""
    if text:
        refuse_cut_call(text)
    value = json_or_text(text)
    return value if isinstance(value, dict) else {RAW_ARGUMENTS: text} if text else {}


def made_searches(turn, engine, tool, calls, most):
    """(n, hits or ApiError) of each call as it is answered; what is beyond `most` is not looked for."""
    queries = [as_text(call["input"].get("query")).strip() for call in calls]
    jobs = [lambda stop_fd, query=query: search_web(turn, engine, tool, query, stop_fd) for query in queries[:most]]
    turn.searches += len(jobs)
    yield from done_beside(turn, jobs, SEARCH_S + 1)
    for n in range(len(jobs), len(calls)):
        yield n, ApiError(429, TOO_MANY, "max_uses_exceeded")


def search_result(call, found) -> dict:
    """What the model is told of its search."""
    result = {"type": "tool_result", "tool_use_id": call["id"]}
    if isinstance(found, ApiError):
        words = "The search failed: %s. Say so; do not make up what it might have found." % found.message
        return {**result, "is_error": True, "content": words}
    return {**result, "content": "\n\n".join(map("{title}\n{url}\n{excerpt}".format_map, found)) or "Nothing was found."}


def result_blocks(id, found) -> list:
    """What the client is told of it; the words of an error as text, since the error itself has room for a code only."""
    result = {"type": "web_search_tool_result", "tool_use_id": id}
    if isinstance(found, ApiError):
        code = found.type if found.type == "max_uses_exceeded" else SEARCH_CODES.get(found.status, "unavailable")
        error = {"type": "web_search_tool_result_error", "error_code": code}
        return [{**result, "content": error}, {"type": "text", "text": "[%s]" % found.message}]
    return [{**result, "content": [{"type": "web_search_result", "url": hit["url"], "title": hit["title"], "page_age": None,
                                    "encrypted_content": OWN_EXCERPT + hit["excerpt"]} for hit in found]}]


SEARCH_CODES = {400: "invalid_tool_input", 429: "too_many_requests"}


def with_told_results(request: dict) -> dict:
    """The request with the searches that ccr told of earlier as text, excerpts included: Anthropic takes only its own."""
    messages = request["messages"]
    found = {block["tool_use_id"]: excerpts_in(block) for message in messages if message["role"] == "assistant"
             for block in blocks_of(message) if block.get("type") == "web_search_tool_result"}

    def told(block):
        excerpts = found.get(as_text(block.get("tool_use_id")))
        if not (excerpts or found.get(as_text(block.get("id")))):
            return block
        return {"type": "text", "text": lines(block_text(block), *excerpts or ())}
    if not any(found.values()):
        return request
    return {**request, "messages": [{**message, "content": list(map(told, blocks_of(message)))} for message in messages]}


def excerpts_in(block) -> list:
    """What our own links say of their pages; [] for those of Anthropic, which are encrypted."""
    texts = [as_text(link.get("encrypted_content")) for link in dicts_in(block.get("content"))]
    return [text[len(OWN_EXCERPT):] for text in texts if not text or text.startswith(OWN_EXCERPT)]


# the engines

class Engine(NamedTuple):
    """A search engine's wire format: address, most results; headers(key); fields(query, count, allowed domains, blocked ones) of
    the JSON body or, is_get, of the query string; where in the answer its hits are, and in a hit its excerpt."""
    address: str
    path: str
    limit: int
    headers: object
    fields: object
    is_get: bool = False
    hits: tuple = ("results",)
    excerpt: str = "content"


def sites(allowed, blocked) -> str:
    """Domains in the words of a query."""
    some = " OR ".join("site:" + domain for domain in allowed)
    return "".join([" (%s)" % some if some else "", *(" -site:" + domain for domain in blocked)])


ENGINES = {
    "ollama": Engine("https://ollama.com", "/api/web_search", 10, bearer,
                     lambda query, count, allowed, blocked: {"query": query, "max_results": count}),
    "tavily": Engine("https://api.tavily.com", "/search", 20, bearer, lambda query, count, allowed, blocked: {
        "query": query, "max_results": count, "include_domains": allowed, "exclude_domains": blocked}),
    "brave": Engine("https://api.search.brave.com", "/res/v1/web/search", 20, lambda key: {"X-Subscription-Token": key or ""},
                    lambda query, count, allowed, blocked: {"q": query + sites(allowed, blocked), "count": count},
                    True, ("web", "results"), "description"),
    "searxng": Engine("", "/search", 50, bearer,
                      lambda query, count, allowed, blocked: {"q": query + sites(allowed, blocked), "format": "json"}, True),
}


def search_engine(config):
    """The WebSearch of the config, or what the key of an ollama.com provider allows; None."""
    clouds = [provider for provider in config.providers if provider.keys and by_host({"ollama.com": True}, provider.url)]
    if clouds and (not config.web_search or config.web_search["engine"] == "ollama"):
        own = {"engine": "ollama", "url": None, "max_results": 8, **(config.web_search or {})}
        return own if own["url"] or own.get("api_key") else {**own, "api_key": clouds[0].keys[0]}
    return config.web_search


def search_web(turn, chosen, tool, query, stop_fd) -> list:
    """[{"title", "url", "excerpt"}] of a search; ApiError in words that help."""
    from urllib.parse import urlencode
    if not chosen or not query:
        raise ApiError(400, "a web search needs a query") if chosen else ApiError(503, NO_SEARCH)
    engine, who = ENGINES[chosen["engine"]], "the search engine " + chosen["engine"]
    url = (chosen["url"] or engine.address).rstrip("/")
    url += "" if url.endswith(engine.path) else engine.path
    fields = engine.fields(query[:400], min(chosen["max_results"], engine.limit), *domains_of(tool))
    headers = {"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": USER_AGENT,
               "Content-Type": "application/json", **engine.headers(chosen.get("api_key"))}
    url, body = (url + "?" + urlencode(fields, errors="replace"), None) if engine.is_get else (url, dump_json(fields))
    watch = Watch(None, stop_fd, SEARCH_S)
    watch.end = time.monotonic() + SEARCH_S
    try:
        answer = read_json(who, turn.upstream.open(turn.config, who, url, headers, body, watch))
        return hits_of(answer, engine, tool, who)[:chosen["max_results"]]
    except ApiError as e:
        words = e.message.replace("api_base_url", "WebSearch.url").replace("the provider", who)
        if e.status == 504:
            words = "%s did not answer within %g s" % (who, SEARCH_S)
        elif e.status == 403 and chosen["engine"] == "searxng":
            words += '; in its settings.yml, search.formats must hold "json"'
        raise ApiError(e.status, turn.state.scrub(words))


def hits_of(answer, engine, tool, who) -> list:
    """The hits of an engine's answer that may be told."""
    hits, silent = answer, as_dict(answer).get("unresponsive_engines")
    for key in engine.hits:
        hits = as_dict(hits).get(key)
    if not hits and silent:    # SearXNG asks others
        raise ApiError(502, "%s got no answer itself: %s" % (who, json.dumps(silent)[:300]))
    found = [{"url": as_text(hit.get("url")), "title": plain_text(hit.get("title")) or as_text(hit.get("url")),
              "excerpt": plain_text(hit.get(engine.excerpt))[:MAX_EXCERPT]} for hit in dicts_in(hits)]
    return [hit for hit in found if re.match("https?://", hit["url"]) and is_allowed(hit, tool)]


def plain_text(value) -> str:
    """The text without Brave's marks and entities."""
    from html import unescape
    return unescape(re.sub("</?strong>", "", as_text(value)))


def is_allowed(link, tool) -> bool:
    """Whether a link is of an allowed domain, or one below it, and of no blocked one; "a.com/blog" means pages below that."""
    from urllib.parse import urlsplit
    try:
        parts = urlsplit(as_text(link.get("url")).lower())
        place = "%s/%s" % (parts.hostname, parts.path.lstrip("/"))
    except ValueError:
        return False
    if parts.hostname == "vertexaisearch.cloud.google.com":    # Google's links lead through it; their titles name the domain
        place = as_text(link.get("title")).lower() + "/"

    def fits(domain):
        domain = re.sub(r"^(https?://)?(\*\.)?", "", domain.strip().lower())
        return re.match(r"([^/]*\.)?" + re.escape(domain) + ("" if "/" in domain else "/"), place)
    allowed, blocked = domains_of(tool)
    return (not allowed or any(map(fits, allowed))) and not any(map(fits, blocked))


# work beside a turn

def done_beside(turn, jobs, seconds):
    """(n, result or ApiError) of each job(stop_fd) as it is done, AT_ONCE at a time; meanwhile the client is watched and pinged.

    A job ends when its stop_fd becomes readable: the turn is over. One that takes longer than `seconds` counts as failed.
    """
    stop, hold = os.pipe()
    todo, done, missing = collections.deque(enumerate(jobs)), collections.deque(), set(range(len(jobs)))

    def work(stop):
        try:
            while True:
                n, job = todo.popleft()
                done.append((n, outcome(job, stop)))
        except IndexError:    # nothing is left to do
            os.close(stop)

    until = time.monotonic() + seconds * -(-len(jobs) // AT_ONCE)
    try:
        for _ in jobs[:AT_ONCE]:    # each with its own copy: a number that the turn has closed may soon be another file
            threading.Thread(target=work, args=(os.dup(stop),), daemon=True).start()
        while missing and (done or time.monotonic() <= until):
            if done:
                n, result = done.popleft()
                missing.discard(n)
                yield n, result
            else:
                turn.watch.progress()
                turn.watch.wait(seconds=0.02)
        for n in sorted(missing):
            yield n, ApiError(504, "there was no answer within %d s" % seconds)
    finally:
        todo.clear()
        os.close(stop)
        os.close(hold)    # by this the copies become readable


def outcome(job, stop_fd):
    try:
        return job(stop_fd)
    except ApiError as e:
        return e
    except Exception as e:
        return ApiError(500, "ccr failed here (%s)" % type(e).__name__)


# --- Sight

# A model that cannot see is given, in place of each image, a description that the model of Router.image wrote: once per image, so
# that the conversation reads the same in every turn, and a provider's cache of it holds.

DESCRIBE_S = 120        # for one description
BLIND_S = 60            # an image that could not be described is not tried again so soon
IMAGE_BYTES = 64 << 20          # of descriptions in the state folder
DESCRIBED = Bounded(2000)       # hash of an image -> (the words for it, how long they stand)
LOOKING = {}                    # hash of an image that a turn looks at just now -> set when that is over
LOOK = """Describe this image for a colleague who cannot see it and has to work from your words alone: all text in it verbatim, \
numbers, layout, and whatever looks wrong. Nothing but the description.

What the colleague was asked about it, as context: %s"""


def sighted(turn, provider, model, look=None) -> dict:
    """The turn's request as this model can read it: with descriptions for images if it cannot see, else as it is.

    look: what finds the words for an image, if not look_once.
    """
    lookers = resolved_targets(targets_of(turn, "image"), turn.config)
    if not lookers or not is_blind(turn, provider, model, lookers):
        return turn.whole
    messages, question = turn.whole["messages"], newest_prompt(turn.whole)[:2000]
    images = [(image_key(block), block) for message in messages for block in images_in(message)]
    texts = {key: known_text(turn.state, key) for key, _ in images}
    new = [(key, block) for key, block in dict(images).items() if texts[key] is None]
    jobs = [lambda stop_fd, one=one: (look or look_once)(turn, lookers, *one, question, stop_fd) for one in new]
    for n, found in done_beside(turn, jobs, DESCRIBE_S + 1):
        texts[new[n][0]] = keep_text(turn.state, new[n][0], found) if isinstance(found, ApiError) else found
    words = {id(block): texts[key] for key, block in images}
    return {**turn.whole, "messages": [with_words(message, words) for message in messages]} if images else turn.whole


def is_blind(turn, provider, model, lookers) -> bool:
    """Whether this model is taken to see no images: its entry says so, or it says nothing and nobody asked for it by name."""
    if (provider.name, model) in [(looker.name, name) for looker, name in lookers]:
        return False
    vision, route = provider.model(model).vision, turn.route
    is_named = route is not None and route.rule in ("explicit", "subagent") and (provider, model) == (route.provider, route.model)
    return not is_named if vision is None else not vision


def images_in(message) -> list:
    """The image blocks of a message, those in results of tools too."""
    blocks = [block for block in blocks_of(message) if message["role"] != "assistant"]
    inner = [each for block in blocks if block.get("type") == "tool_result" for each in dicts_in(block.get("content"))]
    return [block for block in blocks + inner if block.get("type") == "image"]


def with_words(holder, words) -> dict:
    """The message, or tool_result, with words in place of its images; words: id of an image block -> its own."""
    def told(block):
        if id(block) in words:
            return {"type": "text", "text": words[id(block)]}
        return with_words(block, words) if block.get("type") == "tool_result" else block
    old = holder.get("content") if isinstance(holder.get("content"), list) else []
    new = [told(block) for block in old]
    return {**holder, "content": new} if any(a is not b for a, b in zip(new, old)) else holder


def image_key(block) -> str:
    import hashlib
    return hashlib.sha256((image_url(block) or json.dumps(block["source"])).encode("utf-8", "replace")).hexdigest()


def look_once(turn, lookers, key, block, question, stop_fd) -> str:
    """The words for an image; if another turn looks at it just now, that is waited for."""
    mine = threading.Event()
    while (other := LOOKING.setdefault(key, mine)) is not mine:
        other.wait()
    try:
        words = known_text(turn.state, key)
        if words is None:
            found = outcome(lambda stop: look(turn, lookers, block, question, stop), stop_fd)
            if not is_readable(stop_fd):    # a look that was broken off tells nothing of the image
                words = keep_text(turn.state, key, found)
        return words
    finally:
        del LOOKING[key]
        mine.set()


def look(turn, lookers, block, question, stop_fd) -> str:
    """The words for an image, by the first of these models that finds some; each is a turn in the log. ApiError of the last."""
    content = [{"type": "image", "source": block["source"]}, {"type": "text", "text": LOOK % (question or "(nothing)")}]
    for target in lookers:
        body = {"model": target[1], "max_tokens": 4000, "messages": [{"role": "user", "content": content}]}
        inner = Exchange(turn.state, ANTHROPIC, body, {}, None, stop_fd, turn.config)
        inner.route = Route(*target, "image", "an image is described for %s" % target_name(turn.target), inner.request)
        inner.watch.silence_s, inner.watch.end = DESCRIBE_S, inner.began + DESCRIBE_S
        try:
            text = text_of([each for each in fold(inner.ask(*target))["content"] if each.get("type") == "text"]).strip()
            if text:
                return "[an image, as %s describes it:\n%s]" % (target_name(target), text)
            raise ApiError(502, "%s said nothing about the image" % target_name(target))
        except ApiError as e:
            late = "%s gave no description within %g s" % (target_name(target), DESCRIBE_S) if e.status == 504 else None
            error = ApiError(e.status, late or e.message)
            inner.status, inner.error = error.status, error.message
        finally:
            inner.close()
            turn.state.turn(inner.record())
    raise error


# what is known of images

def known_text(state, key):
    """The words for an image that was looked at before, or in vain a moment ago; None."""
    words, until = DESCRIBED.get(key, (None, 0))
    if time.monotonic() < until:
        return words
    words = load_description(state, key)
    if words:
        DESCRIBED[key] = words, float("inf")
    return words


def keep_text(state, key, found) -> str:
    """The words for an image that was looked at just now."""
    if isinstance(found, ApiError):
        found = "[an image that could not be read: %s]" % state.scrub(found.message)[:300]
        DESCRIBED[key] = found, time.monotonic() + BLIND_S
    else:
        DESCRIBED[key] = found, float("inf")
        save_description(state, key, found)
    return found


def load_description(state, key):
    """What is in the state folder, or None; a damaged file will be replaced."""
    try:
        words = json.loads(read_text(os.path.join(state.folder or os.devnull, "images", key + ".json")))
    except (OSError, ValueError, RecursionError):
        return None
    return words if isinstance(words, str) else None


def save_description(state, key, found) -> None:
    folder = os.path.join(state.folder or os.devnull, "images")
    try:
        if state.folder:
            make_folder(folder)
            save_file(os.path.join(folder, key + ".json"), json.dumps(found))
            trim_folder(folder, IMAGE_BYTES)
    except OSError as e:
        state.log("warn", "the description of an image cannot be saved: %s" % e)


def trim_folder(folder, limit) -> None:
    """Removes the oldest files until the rest is within the limit."""
    files = sorted((entry.stat().st_mtime, entry.stat().st_size, entry.path) for entry in os.scandir(folder))
    over = sum(size for _, size, _ in files) - limit
    for _, size, path in files:
        if over <= 0:
            break
        remove(path)
        over -= size


# === 11. Server ====================================================================

MAX_BODY = 64 << 20
MAX_LINES = 200
CLIENT_S = 60             # for a client's header, a gap in its body, an idle connection, a send that does not go on
LINGER_S = 2              # for the rest of a request that was refused
MAX_CONNECTIONS = 1000
LOOPBACK_NAMES = Pattern(r"^(localhost|127(\.\d{1,3}){3}|\[::1\])$", re.I)
HEADER = Pattern(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([^\r\n\0]*)\r?\n")


class Sink:
    """The client's side of a turn: bytes on their way out, pings, and whether the client is still there.

    What is written is kept until flush(), which the Watch calls before it waits: one read, all its events, one send.
    """

    def __init__(self, connection, is_http11, keep_alive):
        self.connection, self.is_http11, self.keep_alive = connection, is_http11, keep_alive
        self.head, self.out, self.size, self.is_head = b"", [], 0, False
        self.is_committed = self.is_broken = False
        self.on_silence = None    # gives the bytes that open an answer early
        self.ping = b""
        self.next_tick = time.monotonic() + FIRST_PING_S

    def fileno(self) -> int:
        return self.connection.fileno()

    def has_left(self) -> bool:
        """Where poll cannot tell (no POLLRDHUP): peeks for the end of the client's stream."""
        try:
            return self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BLOCKED:
            return False
        except OSError:
            return True

    def commit(self, headers) -> None:
        """Opens a stream; the head goes out with the first events."""
        if self.is_committed:
            return
        self.is_committed = True
        framing = [("Transfer-Encoding", "chunked")] if self.is_http11 else []
        self.keep_alive = self.keep_alive and self.is_http11
        self.head = self._head(200, [("Content-Type", "text/event-stream; charset=utf-8"), ("Cache-Control", "no-cache"),
                                     ("X-Accel-Buffering", "no"), *framing, *headers])

    def write(self, data: bytes) -> None:
        self.out.append(data)
        self.size += len(data)
        if self.size > 1 << 18:
            self.flush()

    def flush(self) -> None:
        if self.out or self.head:
            self._send(self._taken())

    def send_now(self, data) -> bool:
        """Sends events at once; False if the client does not take them all now: the rest goes with the next flush."""
        self.head, sent = self._framed(data), 0
        self.next_tick = time.monotonic() + PING_S
        try:
            sent = self.connection.send(self.head, socket.MSG_DONTWAIT)
        except OSError:    # a full buffer, or a broken connection, which the flush finds again
            pass
        self.head = self.head[sent:]
        return not self.head

    def end(self) -> None:
        """The end of the stream, together with what is still to be sent."""
        self._send(self._taken() + (b"0\r\n\r\n" if self.is_http11 else b""))

    def _taken(self) -> bytes:
        data = b"".join(self.out)
        data = self._framed(data) if data else b""
        data, self.head, self.size = self.head + data, b"", 0
        self.out.clear()
        return data

    def _framed(self, data) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if self.is_http11 else data

    def respond(self, status, body: bytes, headers=(), content_type="application/json") -> None:
        """A whole answer in one send."""
        self.is_committed = True
        head = self._head(status, [("Content-Type", content_type), ("Content-Length", str(len(body))), *headers])
        self._send(head if self.is_head else head + body)

    def tick(self, now) -> None:
        """Nothing went out for a while: a sign of life, if the answer is a stream."""
        if self.is_committed and self.ping:
            self.write(self.ping)
        elif self.on_silence is not None:
            self.write(self.on_silence() + self.ping)
        self.next_tick = now + PING_S
        self.flush()

    def _send(self, data) -> None:
        self.next_tick = time.monotonic() + PING_S
        try:
            self.connection.sendall(data)
        except OSError:
            self.is_broken = True
            raise ClientGone()

    def _head(self, status, headers) -> bytes:
        from http.client import responses
        lines = ["HTTP/1.1 %d %s" % (status, responses.get(status, "Error")), *("%s: %s" % pair for pair in headers),
                 "Connection: keep-alive" if self.keep_alive else "Connection: close"]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")


class ApiRequest:
    """One HTTP request behind the gate: method, path, headers (lower-case), body (read on demand), sink."""

    def __init__(self, method, target, headers, is_http11, file, connection):
        self.method, self.headers, self.file = method, headers, file
        self.path = target.partition("?")[0]
        self.length = body_length(headers, is_http11)    # None: chunked
        wanted = headers.get("connection", "").lower()
        self.may_keep_alive = "close" not in wanted if is_http11 else "keep-alive" in wanted
        # until its body is read, the connection cannot be used again: it would be taken for the next request
        self.sink = Sink(connection, is_http11, self.may_keep_alive and self.length == 0)
        self.sink.is_head = method == "HEAD"
        self.data = b"" if self.length == 0 else None

    @property
    def body(self) -> bytes:
        """The body, read and un-gzipped once; ApiError 400 or 413."""
        if self.data is None:
            self.data = read_body(self)
        return self.data

    def json(self) -> dict:
        """The body as a JSON object; ApiError(400) if it is none."""
        return parse_body(self.body)


def body_length(headers, is_http11):
    """The number of body bytes, None for a chunked body; ApiError(400) for framing that two programs could read differently."""
    lengths, coding = headers.get("content-length"), headers.get("transfer-encoding")
    if coding is not None:
        if lengths is not None:
            raise ApiError(400, "Content-Length and Transfer-Encoding together are not accepted")
        if coding.strip().lower() != "chunked" or not is_http11:
            raise ApiError(400, "the only Transfer-Encoding accepted is chunked")
        return None
    if lengths is None:
        return 0
    if not re.match(r"^[0-9]{1,15}$", lengths):
        raise ApiError(400, "Content-Length must be one plain number")
    if int(lengths) > MAX_BODY:
        raise too_large()
    return int(lengths)


def too_large():
    return ApiError(413, "the request is larger than %d MB" % (MAX_BODY >> 20))


def read_body(request) -> bytes:
    if request.headers.get("expect", "").lower() == "100-continue":
        request.sink.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    data = gathered(read_chunks(request.file) if request.length is None else read_counted(request.file, request.length))
    request.sink.keep_alive = request.may_keep_alive
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding in ("identity", ""):
        return data
    if coding != "gzip":
        raise ApiError(400, "Content-Encoding %s is not understood; gzip is" % coding[:40])
    try:
        return gathered(inflate([data]))
    except ApiError as e:
        raise e if e.status == 413 else ApiError(400, "the request's gzip is damaged")


def gathered(pieces) -> bytes:
    """All of the pieces; ApiError(413) when they become more than a body may have."""
    found, size = [], 0
    for piece in pieces:
        size += len(piece)
        if size > MAX_BODY:
            raise too_large()
        found.append(piece)
    return b"".join(found)


def read_counted(file, left):
    while left:
        data = file.read(min(left, 1 << 16))
        if not data:
            raise ApiError(400, "the request ended in the middle of its body")
        left -= len(data)
        yield data


def read_chunks(file):
    size = None
    while size != 0:
        match = re.match(rb"^([0-9a-fA-F]{1,8})[ \t]*(?:;[^\r\n]*)?\r\n$", file.readline(1026))
        size = int(match[1], 16) if match else 0
        yield from read_counted(file, size)
        if not match or size and file.read(2) != b"\r\n":
            raise ApiError(400, "the request's chunked body is damaged")
    read_headers(file)    # trailers say nothing that we need


def read_request(file, connection):
    """The next request of a connection, None at its end. Raises ApiError for what is no plain HTTP/1.x."""
    line = file.readline(MAX_HEAD + 1)
    if line in (b"\r\n", b"\n"):
        line = file.readline(MAX_HEAD + 1)
    if not line:
        return None
    if len(line) > MAX_HEAD:
        raise ApiError(431, "the request line is too long")
    match = re.match(rb"^([A-Z]{1,20}) ([!-~]+) HTTP/1\.([01])\r?\n$", line)
    if not match:
        raise ApiError(400, "this is not an HTTP/1.1 request")
    method, target, headers = match[1].decode(), match[2].decode(), read_headers(file)
    if not target.startswith("/"):
        raise ApiError(400, "the request target must be a path; ccr is no general proxy")
    return ApiRequest(method, target, headers, match[3] == b"1", file, connection)


def read_headers(file) -> dict:
    headers, size = {}, 0
    for _ in range(MAX_LINES):
        line = file.readline(MAX_HEAD + 1)
        size += len(line)
        if size > MAX_HEAD:
            raise ApiError(431, "the request's headers are larger than %d kB" % (MAX_HEAD >> 10))
        if line in (b"\r\n", b"\n"):
            return headers
        match = HEADER.fullmatch(line)
        if not match:
            raise ApiError(400, "a header line is damaged")
        key, text = match[1].decode().lower(), match[2].strip(b" \t").decode("latin-1")
        if key in headers and (key == "transfer-encoding" or key in ("content-length", "host") and headers[key] != text):
            raise ApiError(400, "two %s headers" % key)
        headers[key] = text
    raise ApiError(431, "the request has more than %d header lines" % MAX_LINES)


# --- The gate

def check_gate(server, request) -> None:
    """Refuses what a web page, a rebound name or somebody without the key could send; before any work is done."""
    config, path = server.state.config, request.path
    is_open = path in OPEN_PATHS and request.method in ("GET", "HEAD")
    check_host(request.headers, config, is_guarded=bool(config.apikey) and not is_open)
    check_origin(request.headers, server.port)
    if config.apikey and not is_open and not has_key(request.headers, config.apikey):
        raise ApiError(401,
                       "the APIKEY of this ccr is missing or wrong: send it as `Authorization: Bearer KEY` or `x-api-key: KEY`")


OPEN_PATHS = {"/health", "/ui", "/ui/"}


def check_host(headers, config, is_guarded) -> None:
    """Against DNS rebinding: only names of this machine. Behind the key any name will do: rebinding gains nothing there."""
    host = headers.get("host")
    if host is None:
        raise ApiError(400, "the Host header is missing")
    name = re.sub(r":\d+$", "", host.strip())
    if is_guarded or LOOPBACK_NAMES.match(name) or name.lower() == config.host.lower():
        return
    if config.apikey and not is_loopback(config.host) and re.match(r"^[\d.]+$|^\[[0-9a-fA-F:]+\]$", name):
        return    # the open paths by address, on a LAN
    raise ApiError(403, "the host name %s is not one of this server's; use 127.0.0.1" % header_text(host)[:100])


def check_origin(headers, port) -> None:
    """A web page may only speak to ccr if it is ccr's own."""
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    if site is not None and site not in ("same-origin", "none"):
        raise ApiError(403, "requests from other web pages are refused")
    if origin is None:
        return
    match = re.match(r"^http://(\[[0-9a-fA-F:]+\]|[^/:@\[\]]+):(\d{1,5})$", origin)
    is_own_name = match and (LOOPBACK_NAMES.match(match[1]) or origin == "http://" + headers.get("host", ""))
    if not is_own_name or int(match[2]) != port:
        raise ApiError(403, "requests from the origin %s are refused" % header_text(origin)[:100])


def has_key(headers, apikey) -> bool:
    import hmac
    wanted = apikey.encode("utf-8", "surrogateescape")
    authorization = headers.get("authorization", "")
    given = authorization, re.sub("(?i)^bearer ", "", authorization).strip(), headers.get("x-api-key", "")
    return any([hmac.compare_digest(word.encode("latin-1"), wanted) for word in given])


# --- Endpoints

def serve_turns(ingress):
    """The endpoint for turns in a client's wire format; what is wrong with a request is told in that format too."""
    def refuse(server, request, error) -> None:
        server.state.turn({"time": time.time(), "ingress": ingress.name, "status": error.status, "error": error.message})
        request.sink.respond(error.status, dump_json(ingress.render_error(error)), error_headers(error))

    def serve(server, request, config=None) -> None:
        try:
            request.body    # before it counts as under way: who never sends all of it must not hold up the end
        except ApiError as error:
            return refuse(server, request, error)
        with server:
            try:
                is_safe = ingress is ANTHROPIC and not server.state.custom_router    # it may change what it is given
                key = memo_key(request.body, request.headers) if is_safe else None
                body, known = MEMO_OF_TURNS.parse(request.body, key)
                turn = Exchange(server.state, ingress, body, request.headers, request.sink, server.stop_fd, config, key, known)
            except ApiError as error:
                return refuse(server, request, error)
            serve_turn(turn)
        if turn.sink.is_broken or turn.status == 499:
            request.sink.keep_alive = False
    return serve


def serve_count(server, request, config=None) -> None:
    turn = Exchange(server.state, ANTHROPIC, {**request.json(), "stream": False}, request.headers, config=config)
    model = turn.choose_targets()[0][1]
    request.sink.respond(200, dump_json({"input_tokens": max(1, turn.tokens(model))}))


def serve_models(server, request, config=None) -> None:
    """The models of all providers, or the one that the path names, in a shape that Anthropic's and OpenAI's clients both read."""
    is_anthropic = "anthropic-version" in request.headers or "claude" in request.headers.get("user-agent", "").lower()
    models = {}
    for provider in (config or server.state.config).providers:
        for model in provider.models:
            id = "%s%s,%s" % (LIST_PREFIX if is_anthropic else "", provider.name, model.name)
            models[id] = {"id": id, "type": "model", "object": "model", "display_name": "%s (%s)" % (model.name, provider.name),
                          "owned_by": provider.name, "created": 1767225600, "created_at": "2026-01-01T00:00:00Z"}
    ids = list(models) or [None]
    body = {"object": "list", "data": list(models.values()), "has_more": False, "first_id": ids[0], "last_id": ids[-1]}
    if request.path != MODELS:
        from urllib.parse import unquote
        id = unquote(request.path[len(MODELS) + 1:])
        if id not in models:
            raise ApiError(404, "no provider of this ccr lists the model %s" % header_text(id)[:200])
        body = models[id]
    request.sink.respond(200, dump_json(body))


MODELS = "/v1/models"


def serve_health(server, request) -> None:
    request.sink.respond(200, dump_json(server.health()))


def serve_root(server, request, config=None) -> None:
    request.sink.respond(200, dump_json({"message": "ccr", "version": VERSION}))


def serve_page(server, request) -> None:
    """The page, with a nonce for its own style and script and the token that its writes must carry."""
    nonce = os.urandom(16).hex()
    policy = ("default-src 'none'; script-src 'nonce-%s'; style-src 'nonce-%s'; connect-src 'self'; img-src 'self' data:; "
              "form-action 'none'; frame-ancestors 'none'; base-uri 'none'" % (nonce, nonce))
    token = "" if server.state.config.apikey else server.token    # with an APIKEY, the key is the token
    body = PAGE.replace("@@NONCE@@", nonce).replace("@@TOKEN@@", token).encode("utf-8")
    request.sink.respond(200, body, [("Content-Security-Policy", policy), *PAGE_HEADERS], "text/html; charset=utf-8")


PAGE_HEADERS = [("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer"), ("Cache-Control", "no-store"),
                ("X-Frame-Options", "DENY")]


def serve_page_redirect(server, request) -> None:
    request.sink.respond(302, b"", [("Location", "/ui/")])


ENDPOINTS = {
    ("POST", "/v1/messages"): serve_turns(ANTHROPIC),
    ("POST", "/v1/messages/count_tokens"): serve_count,
    ("POST", "/v1/chat/completions"): serve_turns(OPENAI),
    ("POST", "/v1/responses"): serve_turns(RESPONSES),
    ("GET", MODELS): serve_models,
    ("GET", "/health"): serve_health,
    ("GET", "/"): serve_root,
    ("GET", "/api/hello"): serve_root,
    ("GET", "/ui"): serve_page_redirect,
    ("GET", "/ui/"): serve_page,
}


def find_endpoint(method, path):
    """The function for an exact path; ApiError 404 or 405."""
    preset = re.match(r"/preset/([^/]+)(/v1/.+|/api/hello)$", path)
    if preset:
        endpoint = find_endpoint(method, preset[2])
        return lambda server, request: serve_in_preset(server, request, endpoint, *preset.groups())
    known = re.sub(r"^(/v1/models)/.*|^(/api/providers/)[^/]+(/models)$", r"\1\2\3", path)
    wanted = "GET" if method == "HEAD" else method, known
    if wanted in ENDPOINTS:
        return ENDPOINTS[wanted]
    if wanted in API:
        return lambda server, request: serve_api(server, request, API[wanted])
    allowed = sorted(other for other, place in (*ENDPOINTS, *API) if place == known)
    if allowed:
        raise ApiError(405, "%s is not allowed here; %s is" % (method, ", ".join(allowed)))
    meant = "/v1" + re.sub(r"^(/v1)+", "", path)
    hint = "; %s is there: the client's base URL must end with%s /v1" % (meant, "out" if path.startswith("/v1") else "")
    words = "there is nothing at %s" % header_text(path)[:200]
    raise ApiError(404, words + hint if (wanted[0], meant) in ENDPOINTS else words)


# --- The server itself

def make_handler(server):
    """The handler class of http.server, with its own request reading: strict about framing, and ten times as quick."""
    from http.server import BaseHTTPRequestHandler

    class Handler(BaseHTTPRequestHandler):
        disable_nagle_algorithm = True
        rbufsize = 1 << 16

        def setup(self):
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                self.request.setsockopt(socket.SOL_SOCKET, option, TIMEVAL)
            super().setup()

        def handle(self):
            try:
                while serve_request(server, self):
                    pass
            except (OSError, ApiError, ClientGone):    # the client's socket failed: nobody is there to be told
                pass

    return Handler


def timeval(seconds) -> bytes:
    import struct
    return struct.pack("ll", seconds, 0)


TIMEVAL = timeval(CLIENT_S)


def serve_request(server, handler) -> bool:
    """Serves one request; True if the connection can take another one."""
    request, sink = None, Sink(handler.connection, True, False)
    try:
        request = read_request(handler.rfile, handler.connection)
        if request is None:
            return False
        sink = request.sink
        check_gate(server, request)
        find_endpoint(request.method, request.path)(server, request)
    except OSError:    # of the client's socket
        raise
    except Exception as e:
        if sink.is_committed:
            return False
        error = told_error(server.state, e)
        sink.respond(error.status, dump_json(error_body(error)), error_headers(error))
    if not sink.keep_alive and (request is None or request.data is None):
        linger(handler.connection)
    return sink.keep_alive


def linger(connection) -> None:
    """Takes what the client still sends of a refused request: a reset would destroy the answer that is on its way."""
    connection.shutdown(socket.SHUT_WR)
    connection.settimeout(LINGER_S)
    end = time.monotonic() + LINGER_S
    while connection.recv(1 << 16) and time.monotonic() < end:
        pass


class Server:
    """The HTTP server: ThreadingHTTPServer below, the gate and the endpoints above, and a stop pipe that wakes every wait."""

    def __init__(self, state, host, port):
        self.state, self.host, self.port = state, host, port
        self.instance, self.token = os.urandom(8).hex(), os.urandom(16).hex()
        self.began = time.time()
        self.stop_fd, self.stop_write = os.pipe()
        self.in_flight, self.idle = 0, threading.Condition()
        self.connections = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self.http = None
        connect(state)

    def bind(self) -> None:
        """Listens; raises OSError if the address is taken."""
        from http.server import ThreadingHTTPServer
        outer = self

        class Http(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False
            request_queue_size = 512
            address_family = socket.AF_INET6 if ":" in outer.host else socket.AF_INET

            def server_bind(self):    # without the look-up of the host's full name, which may take seconds
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                self.socket.bind(self.server_address)
                self.server_address = self.socket.getsockname()

            def process_request(self, request, address):
                if outer.connections.acquire(blocking=False):
                    try:
                        return super().process_request(request, address)
                    except RuntimeError:    # no more threads
                        outer.connections.release()
                request.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n"
                                b"Connection: close\r\nRetry-After: 1\r\n\r\n")
                self.shutdown_request(request)

            def process_request_thread(self, request, address):
                try:
                    super().process_request_thread(request, address)
                finally:
                    outer.connections.release()

            def handle_error(self, request, address):
                outer.state.log("error", "a connection failed", error=repr(sys.exc_info()[1]))

        threading.stack_size(4 << 20)    # with less, a deeply nested JSON body kills some versions of Python
        self.http = Http((self.host, self.port), make_handler(self))
        self.port = self.http.server_address[1]

    def serve(self) -> None:
        """Serves in a thread of its own, until drain()."""
        threading.Thread(target=self.http.serve_forever, args=(0.1,), name="server", daemon=True).start()

    def __enter__(self):
        """A with-block is a turn in flight."""
        with self.idle:
            self.in_flight += 1

    def __exit__(self, *_):
        with self.idle:
            self.in_flight -= 1
            self.idle.notify_all()

    def drain(self, seconds) -> bool:
        """Takes no more connections and waits for the turns in flight; those not done then are told so. True if all were done."""
        self.http.shutdown()
        self.http.server_close()
        with self.idle:
            done = self.idle.wait_for(lambda: not self.in_flight, seconds)
            if not done:
                os.write(self.stop_write, b"x")
                self.idle.wait_for(lambda: not self.in_flight, 3)
        return done

    def close(self) -> None:
        self.http.server_close()
        self.state.upstream.pool.close()

    def health(self) -> dict:
        """What `ccr status` shows: who this is, and how it has been."""
        state = self.state
        return {"status": "ok", "version": VERSION, "pid": os.getpid(), "instance": self.instance,
                "uptime_s": round(time.time() - self.began), "address": "%s:%d" % (self.host, self.port),
                "default": (state.config.router.get("default") or ("",))[0], "requests": state.counts["requests"],
                "errors": state.counts["errors"], "in_flight": self.in_flight, "last_error": state.last_error,
                "config_stamp": state.adopted[0]}    # which state of config.json it goes by


# --- Editing the text of a config file ------------------------------------------------------

INDENT = "  "
LINE_END = Pattern(r"[ \t]*(?:/\*(?:(?!\*/)[^\n\r])*\*/[ \t]*)*(?://[^\n\r]*)?(?=[\r\n])")


class Node(NamedTuple):
    """One JSON5 value as it stands in a text: a word, or a container. head, tail: what stands just inside its brackets; comma:
    the one after its last member, if any."""
    start: int
    text: str
    head: str = ""
    pieces: tuple = ()
    comma: str = ""
    tail: str = ""


class Piece(NamedTuple):
    """One member of a container: lead + label + node.text, a comma, behind. So a comment moves with what it is about."""
    key: object
    lead: str
    label: str
    node: Node
    behind: str


def edit_json5(text: str, new) -> str:
    """`text` changed as little as possible so that it says `new`: order, comments, spelling and layout of the rest stay."""
    node = parse_node(text)
    edited = text[:node.start] + edit_node(text, node, parse_json5(text), new) + text[node.start + len(node.text):]
    if not is_same(parse_json5(edited), new):
        raise ApiError(500, "config.json could not be edited in place; nothing was written")
    return edited


def parse_node(text: str) -> Node:
    """The value of a text that is known to be good JSON5."""
    tokens = (token for token in JSON_TOKEN.finditer(text) if token.lastgroup != "space" and token[0] != ":")
    return take_node(text, tokens, next(tokens))


def take_node(text: str, tokens, token) -> Node:
    """The value that begins with this token; what belongs to it is taken from the tokens that follow."""
    start, kind, seen = token.start(), token[0], token.end()
    if kind not in ("{", "["):
        return Node(start, kind)
    behind, pieces, key, comma = [""], [], None, ""         # behind: the head, then what stands behind each piece
    for token in tokens:
        word, at = token[0], token.start()
        if word == ",":
            behind[-1], comma, seen = text[seen:at], word, at + 1
            continue
        if key is None:
            rest = LINE_END.match(text, seen)               # a comment on the line of a piece is about that piece
            behind[-1] += rest[0] if rest else ""
            lead, begin = text[rest.end() if rest else seen:at], at
            if word in ("}", "]"):
                pieces = [Piece(*piece, trail) for piece, trail in zip(pieces, behind[1:])]
                return Node(start, text[start:at + 1], behind[0], pieces, comma, lead)
            if kind == "{":
                key = parse_json5(word) if word[0] in "\"'" else word
                continue
        node = take_node(text, tokens, token)
        pieces.append((key, lead, text[begin:node.start], node))
        behind.append("")
        key, comma, seen = None, "", node.start + len(node.text)


def edit_node(text: str, node: Node, old, new) -> str:
    """The text of `node`, which says `old`, changed to say `new`."""
    if is_same(old, new):
        return node.text
    margin, pieces = re.match(r"[ \t]*", text[text.rfind("\n", 0, node.start) + 1:]).group(), node.pieces
    if (node.text[0], type(new)) not in (("{", dict), ("[", list)):
        return write_json(new, margin)
    lead = re.search(r"(\r?\n)?[ \t]*$", pieces[-1].lead).group() if pieces else "\n" + margin + INDENT
    if type(new) is dict:
        places = {piece.key: place for place, piece in enumerate(pieces)}
        members = [(places.get(name), name, new[name]) for name in dict.fromkeys([*filter(new.__contains__, places), *new])]
    else:
        members = zip(pair_items(old, new), [None] * len(new), new)
    kept = []
    for place, name, value in members:
        if place is None:
            label = "" if name is None else json.dumps(name) + ": "
            kept.append((lead, label + write_json(value, lead.strip("\r\n")), ""))
        else:
            piece, said = pieces[place], old[place if name is None else name]
            kept.append((piece.lead, piece.label + edit_node(text, piece.node, said, value), piece.behind))
    return join_pieces(node, margin, kept)


def join_pieces(node: Node, margin: str, kept: list) -> str:
    """A container of these (lead, label and value, behind); a trailing comma stays where there was one."""
    def after(blank, next):      # a line comment must not swallow what follows it
        return "\n" + margin + next if "//" in blank[blank.rfind("\n") + 1:] and not next.startswith(("\n", "\r")) else next
    first_lead = node.pieces[0].lead if node.pieces and not node.pieces[0].lead.strip(" ") else ""
    out, last = node.text[0] + node.head, node.head
    for number, (lead, value, behind) in enumerate(kept, 1):
        if not lead.strip(" "):     # on one line
            lead = first_lead if number == 1 else lead or " "
        out += after(last, lead) + value + ("," if number < len(kept) else node.comma) + behind
        last = behind
    return out + after(last, node.tail if node.pieces or not kept else "\n" + margin) + node.text[-1]


def pair_items(old: list, new: list) -> list:
    """For each new item the place of the old one whose text it inherits: of the same name or value, else place; or None."""
    def identity(item):
        return json.dumps(item.get("name", item) if isinstance(item, dict) else item, sort_keys=True)
    places = collections.defaultdict(list)
    for place, item in enumerate(old):
        places[identity(item)].append(place)
    pairs = [places[identity(item)].pop(0) if places[identity(item)] else None for item in new]
    return [place if pair is None and place < len(old) and place not in pairs else pair for place, pair in enumerate(pairs)]


def is_same(a, b) -> bool:
    """Equal as JSON: 1, 1.0 and true are three things; the order of keys says nothing."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def write_json(value, margin: str = "") -> str:
    """The value as people write it: objects over several lines, short lists on one."""
    text = json.dumps(value, ensure_ascii=False, indent=INDENT)
    text = re.sub(r"\[\n\s*([^\[\]{}]{1,100}?)\n\s*\]", lambda found: "[%s]" % re.sub(r",\n\s*", ", ", found[1]), text)
    return text.replace("\n", "\n" + margin)


def line_of(text: str, path: str):
    """The line (from 1) where the thing of a path such as Providers[1].models stands in the text, or where its parent does."""
    node = parse_node(text)
    while node:
        start, path, pieces, node = node.start, path.lstrip("."), node.pieces, None
        for place, piece in enumerate(pieces):
            step = "[%d]" % place if piece.key is None else piece.key
            if step and re.match(re.escape(step) + r"(?![^.\[])", path, re.I):
                node, rest = piece.node, path[len(step):]
        path = rest if node else path
    return text.count("\n", 0, start) + 1


# --- Secrets of a config: shown as ***, put back on save ----------------------------------------

SECRET_NAME = r"api[_-]?key|secret|token(?!s|iz)|passw|authorization|credential|private[_-]?key|access[_-]?key|cookie"
SECRET_VALUE = Pattern(r"://[^/@\s]*:[^/@\s]*@|[?&](?:key|token|api_key)=[^$]|^(?:Bearer|Basic) +[^$]", re.I)
REFERENCE = Pattern(r"(?:Bearer +)?\$(?:[A-Z_][A-Z0-9_]*|\{[A-Z_][A-Z0-9_]*\})$")
MASK = Pattern(r"\*\*\*(\d{0,4})$")
COMMENT = Pattern(r"""("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')|(//[^\n\r]*|/\*.*?\*/)""", re.S)
COMMENTED_KEY = Pattern(r"""((?:%s)[\w-]*["']?\s*[:=][\s\["']*)(?!\$)[^\s"',\]}]{4,}|\b(?:sk|gsk|xai|nvapi|hf|pplx|csk|AIza)"""
                        r"""[-_]?[\w-]{16,}|\b(?=[a-z_]*\d)\w{32,}\b""" % SECRET_NAME, re.I)
ADDRESS = ("api_base_url", "url", "proxy", "engine")


def mask(value, secrets=(), name=""):
    """The config with every secret as *** (in a list ***1, ***2 ...); `$VAR`s are no secrets and stay."""
    if isinstance(value, dict):
        return {key: mask(item, secrets, key) for key, item in value.items()}
    if isinstance(value, list):
        shown = [mask(item, secrets, name) for item in value]
        return [item + str(number) if item == "***" else item for number, item in enumerate(shown, 1)]
    if not isinstance(value, str) or not value.strip() or REFERENCE.match(value):
        return value
    is_secret = re.search(SECRET_NAME, name, re.I) or SECRET_VALUE.search(value) or any(secret in value for secret in secrets)
    return "***" if is_secret else value


def unmask(new, old, secrets, problems, path=""):
    """`new` with every *** put back from `old`. One whose name or address changed is a problem instead.

    Otherwise a web page could have a stored key sent to a host of its choice.
    """
    if isinstance(new, dict):
        shown = mask(old, secrets) if isinstance(old, dict) else {}
        before = old if shown and all(new.get(field) == shown.get(field) for field in ADDRESS) else {}
        return {key: unmask(item, before.get(key), secrets, problems, path + "." + key if path else key)
                for key, item in new.items()}
    if isinstance(new, list):
        before = old if isinstance(old, list) else []
        return [unmask(item, partner_of(item, place, before), secrets, problems, "%s[%d]" % (path, place))
                for place, item in enumerate(new)]
    if not isinstance(new, str) or not MASK.match(new):
        return new
    if not isinstance(old, str):
        problems.append(path + ": enter it again: the stored value belongs to another name or address")
        return new
    return old


def partner_of(item, place, before: list):
    """What a list held for this item: of its name, else of the number in its mask, else at its place."""
    if isinstance(item, dict) and "name" in item:
        return next((other for other in before if as_dict(other).get("name") == item["name"]), None)
    found = MASK.match(item) if isinstance(item, str) else None
    return dict(enumerate(before)).get(int(found[1] or 1) - 1 if found else place)


def mask_comments(text: str) -> str:
    """The text with *** for what looks like a key in its comments."""
    return COMMENT.sub(lambda match: match[1] or COMMENTED_KEY.sub(r"\1***", match[2]), text)


def unmask_comments(text: str, old: str) -> str:
    """The text with its comments as they stand in the old one, where only *** is in place of a key."""
    known = collections.defaultdict(list)    # some look the same when masked: they keep their order
    for match in COMMENT.finditer(old):
        known[mask_comments(match[2] or "")].append(match[2])
    return COMMENT.sub(lambda match: match[1] or (known[match[2]] or [match[2]]).pop(0), text)


# --- The page's API -----------------------------------------------------------------------------

LOCKED = ("CUSTOM_ROUTER_PATH", "CLAUDE_PATH", "REWRITE_SYSTEM_PROMPT", "transformers")    # what they name is run or read as you
SAVING = threading.Lock()
WELL_KNOWN = (      # providers that need nothing but a key: name, title, address, the variable where the key usually stands
    ("ollama", "Ollama Cloud", "https://ollama.com/v1/chat/completions", "OLLAMA_API_KEY"),
    ("openrouter", "OpenRouter", "https://openrouter.ai/api/v1/chat/completions", "OPENROUTER_API_KEY"),
    ("deepseek", "DeepSeek", "https://api.deepseek.com/chat/completions", "DEEPSEEK_API_KEY"),
    ("gemini", "Gemini", "https://generativelanguage.googleapis.com/v1beta/models/", "GEMINI_API_KEY"),
    ("openai", "OpenAI", "https://api.openai.com/v1/chat/completions", "OPENAI_API_KEY"),
    ("anthropic", "Anthropic", "https://api.anthropic.com/v1/messages", "ANTHROPIC_API_KEY"),
    ("groq", "Groq", "https://api.groq.com/openai/v1/chat/completions", "GROQ_API_KEY"),
    ("mistral", "Mistral", "https://api.mistral.ai/v1/chat/completions", "MISTRAL_API_KEY"),
    ("moonshot", "Moonshot", "https://api.moonshot.ai/v1/chat/completions", "MOONSHOT_API_KEY"),
    ("zai", "Z.ai", "https://api.z.ai/api/paas/v4/chat/completions", "ZAI_API_KEY"),
    ("cerebras", "Cerebras", "https://api.cerebras.ai/v1/chat/completions", "CEREBRAS_API_KEY"),
    ("dashscope", "DashScope", "https://dashscope-intl.aliyuncs.com/compatible-mode/v1/chat/completions", "DASHSCOPE_API_KEY"),
    ("local", "Ollama here", "http://127.0.0.1:11434/v1/chat/completions", ""),
    ("lmstudio", "LM Studio", "http://127.0.0.1:1234/v1/chat/completions", ""),
    ("llamacpp", "llama.cpp", "http://127.0.0.1:8080/v1/chat/completions", ""),
    ("vllm", "vLLM", "http://127.0.0.1:8000/v1/chat/completions", ""),
)


class Source(NamedTuple):
    """The config file: its text, the value it says, its version, and why it cannot be read (the rest is then what runs)."""
    text: str
    raw: dict
    version: str
    fault: str = None


def serve_api(server, request, action) -> None:
    """An entry of API. A write needs JSON, and the token or the APIKEY; a faulty config gets a 400 with all its faults."""
    if request.method not in ("GET", "HEAD"):
        check_write(server, request)
    try:
        body = action(server, request)
    except ConfigError as e:
        raise refusal(server, e.problems)
    if body is not None:    # else it has streamed by itself
        request.sink.respond(200, dump_json(body), PAGE_HEADERS)


def refusal(server, problems, text=None) -> ApiError:
    """All faults of a config, with their lines in its text."""
    words = list(map(server.state.scrub, problems))
    return ApiError(400, "\n".join(words), details=[split_problem(each, text) for each in words])


def check_write(server, request) -> None:
    import hmac
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(400, "send it with content-type: application/json")
    token, apikey = request.headers.get("x-ccr-token", ""), server.state.config.apikey
    has_token = hmac.compare_digest(token.encode("utf-8", "replace"), server.token.encode())
    if not has_token and not (apikey and has_key(request.headers, apikey)):
        raise ApiError(403, "x-ccr-token is missing or from before a restart: load the page again")


def split_problem(problem: str, text: str = None) -> dict:
    """"Router.think: ..." -> {"path", "message", "line"}; "line 3, column 7: ..." has no path but a column."""
    found = re.match(r"(?:line (\d+), column (\d+)|(\S+)): (.*)", problem, re.S)
    if not found:
        return {"path": "", "message": problem, "line": None}
    line, column, path, message = found.groups()
    if line:
        return {"path": "", "message": message, "line": int(line), "column": int(column)}
    return {"path": path, "message": message, "line": line_of(text, path) if text else None}


def read_source(server) -> Source:
    """The config file; where it is absent or damaged, what is running instead."""
    import hashlib
    running, version, fault = {} if server.state.config.is_demo else server.state.config.raw, "none", None
    try:
        text = read_text(server.state.config_path)
        version = hashlib.sha256(text.encode("utf-8")).hexdigest()[:20]
        raw = parse_json5(text)
        if isinstance(raw, dict):
            return Source(text, raw, version)
        fault = "it is no object: {...}"
    except FileNotFoundError:
        running = {}
    except (OSError, ValueError, ConfigError) as e:
        fault = str(e)
    return Source(write_json(running) + "\n", running, version, fault)


def check_config(server, raw: dict) -> tuple:
    """(Config or None, all its problems), by the same code as at start."""
    try:
        names = {*known_transformers(), *custom_names(raw, os.path.dirname(server.state.config_path))}
        return parse_config(raw, server.state.env, names), []
    except ConfigError as e:
        return None, e.problems


def read_draft(server, body: dict, source: Source) -> tuple:
    """(the file's text with what is wanted, its value, Config or None, problems) of {"config"}, {"text"} or a bare config."""
    text, asked, problems = source.text, body.get("config", body), []
    if "config" not in body and isinstance(body.get("text"), str):
        text = unmask_comments(body["text"], source.text)
        asked = parse_json5(text)
    if not isinstance(asked, dict):
        raise ConfigError(["config: expected an object {...}"])
    raw = unmask(asked, source.raw, server.state.secrets, problems)
    locked = [name for name in LOCKED if not is_same(source.raw.get(name), raw.get(name))]
    if locked:      # before the check, which reads what transformers[] names
        words = "%s: can only be changed in config.json itself, because what it names runs or is read as you"
        raise ConfigError([words % name for name in locked])
    config, faults = check_config(server, raw)
    return edit_json5(text, raw), raw, config, problems + faults


def show_config(server, source: Source, problems=None, **more) -> dict:
    """All that the page needs to know about a config, and none of its secrets."""
    state, (config, found) = server.state, check_config(server, source.raw)
    text = mask_comments(edit_json5(source.text, mask(source.raw, state.secrets)))
    variables = sorted({*variables_in(source.raw), *(row[3] for row in WELL_KNOWN)})
    body = {"config": mask(source.raw, state.secrets), "text": text, "version": source.version, "path": state.config_path,
            "exists": source.version != "none", "fault": source.fault, "locked": LOCKED,
            "problems": [split_problem(problem, text) for problem in (found if problems is None else problems)],
            "warnings": list((config or state.config).warnings),
            "variables": {name: bool(state.env.get(name)) for name in variables},
            "hosts": WELL_KNOWN,
            "server": {**server.health(), "is_demo": state.config.is_demo}, **more}
    return scrubbed(body, state.scrub)


def get_config(server, request):
    return show_config(server, read_source(server))


def put_config(server, request):
    """Saves {"config" or "text", "version"}, all or nothing; "dry": true only says what would be. 409: the version is old."""
    body = request.json()
    with SAVING:
        source = read_source(server)
        if body.get("version", source.version) != source.version and not body.get("dry"):
            raise ApiError(409, "config.json was changed by somebody else since you opened it")
        text, raw, config, problems = read_draft(server, body, source)
        if body.get("dry"):
            return show_config(server, source._replace(text=text, raw=raw), problems)
        if config and not config.apikey and not is_loopback(server.host):
            problems.append("APIKEY: ccr listens on %s, where it cannot do without a key" % server.host)
        if problems:
            raise refusal(server, problems, text)
        try:
            save_config(server.state.config_path, text)
        except (OSError, ValueError) as e:
            raise ApiError(500 if isinstance(e, OSError) else 400, "config.json cannot be written: %s" % e) from None
        return show_config(server, read_source(server), saved=True, needs_restart=server.state.reload())


def draft_provider(server, body: dict):
    """The Provider that a body means: {"provider": {...}} as it stands in the page, or {"name": ...} of the running config."""
    if "provider" not in body:
        provider = server.state.config.provider(str(body.get("name")))
        if provider is None:
            raise ApiError(404, "there is no provider %s" % json.dumps(str(body.get("name"))[:100]))
        return provider
    stored, problems = read_source(server).raw, []
    stored = stored.get("Providers") or stored.get("providers")
    provider, = unmask([body["provider"]], stored, server.state.secrets, problems, "Providers")
    route = "%s,any" % as_dict(provider).get("name")
    config, faults = check_config(server, {"Providers": [provider], "Router": {"default": route}})
    problems += [fault for fault in faults if fault.startswith("Providers")]
    if problems or not config:
        raise ConfigError(problems or faults)
    return config.providers[0]


def test_provider(server, request):
    """One tiny question to a provider: how long the answer took, or the provider's own words."""
    body = request.json()
    provider, began = draft_provider(server, body), time.monotonic()
    model = str(body.get("model") or next((model.name for model in provider.models), ""))
    question = {"max_tokens": 64, "messages": [{"role": "user", "content": "Reply with the one word OK."}]}
    try:
        message, _ = ask(server.state, provider, model, question, 30)
    except ApiError as e:
        return {"ok": False, "model": model, "status": e.status, "message": server.state.scrub(e.message)}
    text = "".join(block.get("text") or block.get("thinking") or "" for block in message["content"])
    return {"ok": True, "model": model, "text": server.state.scrub(text)[:200],
            "ms": round((time.monotonic() - began) * 1000)}


def provider_models(server, request):
    """The models that a provider itself lists: GET for a saved one, POST {"provider": ...} for one that is being edited."""
    from urllib.parse import unquote
    name = unquote(request.path.split("/")[3])
    provider = draft_provider(server, request.json() if request.method == "POST" else {"name": name})
    return {"models": listed_models(open_json(server.state, provider, models_url(provider)))}


def models_url(provider) -> str:
    """Where a provider lists its models: beside the endpoint that answers."""
    endpoint = FORMATS[provider.format].endpoint(provider.url, "m", False).partition("?")[0]
    return re.sub(r"/(?:chat/completions|messages|responses|models/[^/]*)$", "", endpoint) + "/models"


def listed_models(value) -> list:
    """[{"name", "context"}] of a list of models, in OpenAI's shape or Gemini's, Ollama's, llama.cpp's, OpenRouter's."""
    items = value.get("data") or value.get("models") if isinstance(value, dict) else value
    models = {}
    for item in items if isinstance(items, list) else ():
        item = item if isinstance(item, dict) else {"id": item}
        name = re.sub(r"^models/", "", str(item.get("id") or item.get("name") or item.get("model") or ""))
        if name and "generateContent" in item.get("supportedGenerationMethods", ("generateContent",)):
            sizes = {**item, **as_dict(item.get("meta"))}
            models[name] = next((sizes[field] for field in CONTEXT_FIELDS if type(sizes.get(field)) is int), None)
    return [{"name": name, "context": context} for name, context in models.items()]


CONTEXT_FIELDS = ("context_length", "context_window", "max_model_len", "max_context_length", "inputTokenLimit", "n_ctx",
                  "n_ctx_train")


def explain_prompt(server, request):
    """Which rule a prompt would fire and why, without sending it: {"prompt"} or {"request"}, with {"config"} to try a draft."""
    body, config = request.json(), server.state.config
    if "config" in body:
        _, _, config, problems = read_draft(server, body, read_source(server))
        if config is None:
            raise ConfigError(problems)
    asked = body.get("request") or {"messages": [{"role": "user", "content": body.get("prompt")}]}
    if not isinstance(asked, dict):
        raise ApiError(400, "request: expected an object {...}")
    asked = {"model": body.get("model") or "claude-sonnet-4-5", "max_tokens": 1000, **asked, "stream": False}
    exchange = Exchange(server.state, ANTHROPIC, asked, {}, config=config)
    turn = exchange.turn()
    route = choose_route(turn, config)
    rules = [dict(zip(("rule", "target", "reason"), row)) for row in explain_route(turn, config)]
    return {"rule": route.rule, "reason": route.reason, "model": target_name((route.provider, route.model)),
            "tokens": exchange.tokens(route.model), "fallbacks": list(map(target_name, route.fallbacks)),
            "rules": rules}


def get_transformers(server, request):
    """The transformers there are, the owner's own among them, and their options, for forms."""
    classes = dict.fromkeys([*TRANSFORMERS.values(), *server.state.custom_transformers.values()])
    return {"transformers": sorted(map(describe_transformer, classes), key=lambda row: row["name"].lower())}


def describe_transformer(cls) -> dict:
    names = {cls.name.lower(), *(name for name, other in TRANSFORMERS.items() if other is cls)}
    options = [{"name": name, "type": kind.__name__, "about": about}
               for name, (kind, about) in getattr(cls, "options", {}).items()]
    return {"name": cls.name, "names": sorted(names), "about": getattr(cls, "about", ""), "options": options}


# --- Turns as they happen

WATCH_LOOK_S = 0.3        # how often a watched server is looked at for turns that have begun or gone on


def live_record(turn) -> dict:
    """What is known of a turn under way: as in the log, without an end."""
    (provider, model), route = turn.target or (None, None), turn.route
    return {"time": iso_time(turn.wall), "request_id": turn.id, "session": turn.session, "ingress": turn.ingress.name,
            "asked": turn.body.get("model"), "provider": provider and provider.name, "model": model,
            "rule": route and route.rule, "reason": route and route.reason, "status": None,
            "first_ms": turn.first_at and round((turn.first_at - turn.began) * 1000), "stream": turn.wants_stream}


def told(record, prices) -> dict:
    """A turn's record with what follows from it: its cost, if there are prices, and its speed."""
    return {**record, "cost": cost_of(record, prices.get("%s,%s" % (record.get("provider"), record.get("model")))),
            "tokens_per_s": speed_of(record)}


def speed_of(record):
    """Tokens per second after the first; None where there is nothing to measure."""
    first, said = record.get("first_ms"), record.get("output_tokens") or 0
    took = (record.get("ms") or 0) - first if first is not None else 0
    return round(said * 1000 / took, 1) if said > 1 and took >= 100 else None


def get_turns(server, request):
    """The newest turns, then each as it begins, goes on and ends, as server-sent events."""
    state, sink, seen, shown = server.state, request.sink, 0, {}
    if request.method == "HEAD":
        return {}
    sink.commit([("X-Content-Type-Options", "nosniff")])
    sink.keep_alive, next_ping = False, 0
    while not sink.has_left():
        with state.watchers:
            state.watchers.wait_for(lambda: state.turn_count > seen, WATCH_LOOK_S if next_ping else 0)
        ended, seen = turns_since(state, seen)
        live = {turn.id: live_record(turn) for turn in list(state.under_way.values())}
        news = [told(record, state.config.prices) for record in ended]
        news += [record for id, record in live.items() if shown.get(id) != record]
        shown = live
        if news or time.monotonic() > next_ping:
            sink.write(b"".join(map(encode_data, news)) or b": quiet\n\n")
            sink.flush()
            next_ping = time.monotonic() + 10


def turns_since(state, seen: int) -> tuple:
    """(the finished turns after the first `seen` of this process, as far as they are kept; how many there were in all)."""
    with state.watchers:
        count = state.turn_count
        return list(state.turns)[seen - count:] if count > seen else [], count


class DayBook:
    """What today's turns add up to by model, and by model and minute: from the log, when somebody looks, each line once."""

    def __init__(self):
        self.lock, self.day = threading.Lock(), None

    def catch_up(self, state) -> None:
        """Takes in what is new since the last look. Where turns are not logged, only the newest are known."""
        midnight = time.mktime(time.localtime()[:3] + (0, 0, 0, 0, 0, -1))
        day = midnight, state.logs is not None and state.wants("info")
        if day != self.day:
            self.day, self.read, self.seen, self.models, self.minutes = day, {}, 0, {}, {}
        turns, self.seen = turns_since(state, self.seen)
        if day[1]:
            folder = state.logs.folder
            turns = (turn for name in log_files(folder) for turn in self.new_turns(os.path.join(folder, name)))
        since = iso_time(midnight)
        for turn in turns:
            if turn["time"] >= since:
                self.add(turn)

    def new_turns(self, path):
        """The records that a log file got since it was last read."""
        try:
            if os.path.getmtime(path) < self.day[0]:
                return
            with open(path, "rb") as f:
                f.seek(self.read.get(path, 0))
                for line in f:
                    if not line.endswith(b"\n"):    # the rest is just being written
                        return
                    self.read[path] = self.read.get(path, 0) + len(line)
                    yield from filter(None, [turn_of(line)])
        except OSError:     # rotated away meanwhile
            return

    def add(self, turn) -> None:
        name = "%s,%s" % (turn.get("provider"), turn["model"]) if turn.get("model") else ""
        if name not in self.models:
            sums = dict.fromkeys(("turns", "errors", *TOKEN_FIELDS), 0)
            self.models[name] = sums, collections.deque(maxlen=500), collections.deque(maxlen=500)
        (sums, first, speed), minute = self.models[name], self.minutes.setdefault((name, turn["time"][:16]), [0, 0])
        for field in TOKEN_FIELDS:
            sums[field] += turn.get(field) or 0
        sums["turns"] += 1
        sums["errors"] += bool(turn.get("error"))
        first.append(turn.get("first_ms"))
        speed.append(speed_of(turn))
        minute[0] += 1
        minute[1] += (turn.get("input_tokens") or 0) + (turn.get("output_tokens") or 0)

    def show(self, prices, start) -> dict:
        """Totals by model, most used first; turns and tokens of each in the sixty minutes from `start` on."""
        places, series = {iso_time((start + n) * 60)[:16]: n for n in range(60)}, {"turns": {}, "tokens": {}}
        self.minutes = {key: amounts for key, amounts in self.minutes.items() if key[1] in places}
        for (name, minute), amounts in self.minutes.items():
            for each, amount in zip(series.values(), amounts):
                each.setdefault(name, [0] * 60)[places[minute]] = amount
        models = [{"model": name, **sums, "cost": cost_of(sums, prices.get(name)), "first_ms": middle(first),
                   "tokens_per_s": middle(speed)} for name, (sums, first, speed) in self.models.items()]
        return {"models": sorted(models, key=lambda model: -model["turns"]), "start": start * 60000, **series}


def turn_of(line):
    """The record of a turn, or None if the line is cut or about something else."""
    try:
        record = json.loads(line.decode())
        return record if "request_id" in record and isinstance(record["time"], str) else None
    except (ValueError, TypeError, KeyError):
        return None


def middle(values):
    """The median of those that are known, or None."""
    values = sorted(value for value in values if value is not None)
    return values[len(values) // 2] if values else None


TOKEN_FIELDS = ("input_tokens", "cached_tokens", "output_tokens")


def cost_of(sums, price):
    """What these tokens cost at [input, cached, output] per million; None without a price."""
    read, cached, said = (sums.get(field) or 0 for field in TOKEN_FIELDS)
    return None if price is None else round(((read - cached) * price[0] + cached * price[1] + said * price[2]) / 1e6, 6)


def get_stats(server, request):
    state, start = server.state, int(time.time() // 60) - 59
    book = state.__dict__.setdefault("day_book", DayBook())
    with book.lock:
        book.catch_up(state)
        shown = book.show(state.config.prices, start)
    return {**shown, "in_flight": server.in_flight, "is_whole_day": book.day[1]}


API = {
    ("GET", "/api/config"): get_config,
    ("PUT", "/api/config"): put_config,
    ("POST", "/api/config"): put_config,
    ("GET", "/api/turns"): get_turns,
    ("GET", "/api/stats"): get_stats,
    ("GET", "/api/transformers"): get_transformers,
    ("POST", "/api/explain"): explain_prompt,
    ("POST", "/api/providers/test"): test_provider,
    ("GET", "/api/providers//models"): provider_models,
    ("POST", "/api/providers//models"): provider_models,
}


# --- Presets: providers and routes of their own, behind /preset/NAME/v1/... -------------------------

PRESET_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}"
PRESET_KEYS = ("Providers", "Router", "fallback", "StatusLine", "prices", "API_TIMEOUT_MS", "forceUseImageAgent")    # no code
PRESET_BYTES = 1 << 20
MANIFEST_KINDS = {"schema": list, "configMappings": list, "Providers": list, "userValues": dict, "template": dict,
                  "claudeCodeSettings": dict}
QUESTION_MARK = Pattern(r"#\{([\w.-]+)\}|\{\{([\w.-]+)\}\}")


def preset_file(env, name) -> str:
    """The path of an installed preset's manifest; ApiError(404) for what is no name."""
    if not re.fullmatch(PRESET_NAME, name):
        raise ApiError(404, "%s is no name of a preset: up to 64 of A-Z a-z 0-9 . _ -, not . or - first" % shown(name))
    return os.path.join(home_of(env), HOME_FOLDER, "presets", name, "manifest.json")


def load_manifest(path) -> dict:
    """The object in a manifest.json, which is never anything but read. ConfigError."""
    try:
        if not os.path.isfile(path):
            raise ConfigError(["%s: there is no such file" % path])
        if os.path.getsize(path) > PRESET_BYTES:
            raise ConfigError(["%s is larger than %d MB" % (path, PRESET_BYTES >> 20)])
        value = parse_json5(read_text(path))
        write_json(value).encode()    # half a surrogate pair could not be saved
    except (OSError, ValueError) as e:
        raise ConfigError(["%s cannot be read: %s" % (path, getattr(e, "strerror", None) or e)]) from None
    if not isinstance(value, dict):
        raise ConfigError(["%s: expected an object {...}" % path])
    for key, kind in MANIFEST_KINDS.items():
        items = value.get(key) or kind()
        if not isinstance(items, kind) or kind is list and not all(isinstance(item, dict) for item in items):
            raise ConfigError(["%s: %s: expected %s" % (path, key, "an object" if kind is dict else "a list of objects")])
    return value


def serve_in_preset(server, request, endpoint, name, path) -> None:
    """An endpoint with the preset's Config instead of the running one."""
    request.path = path
    endpoint(server, request, find_preset(server.state, name))


def find_preset(state, name) -> Config:
    """The Config of an installed preset over the running one, made once for each state of both. ApiError."""
    path, known = preset_file(state.env, name), state.__dict__.setdefault("presets", Bounded(100))
    running, changed, found = state.config, stamp(path), known.get(name)
    if changed is None:
        raise ApiError(404, "no preset is called %s; `ccr preset list` shows those that are installed" % shown(name))
    if not found or found[0] is not running or found[1] != changed:
        try:
            found = running, changed, preset_config(load_manifest(path), running, state.env)
        except ConfigError as e:
            raise ApiError(400, "preset %s: %s" % (name, "; ".join(e.problems))) from None
        state.secrets |= real_secrets(found[2])
        state.scrub = scrubber(state.secrets)
        known[name] = found
    return found[2]


def preset_config(manifest, base, env) -> Config:
    """The Config of a manifest: its providers, routes and fallbacks instead of `base`'s, the rest from there. ConfigError."""
    own, problems, owners = preset_values(manifest), [], key_owners(base)
    entries = own.get("Providers") if isinstance(own.get("Providers"), list) else []
    providers = [own_provider(entry, "Providers[%d]" % i, base, owners, env, problems) for i, entry in enumerate(entries)]
    problems += ["%s: a preset may name variables in its providers only" % key for key in own
                 if key != "Providers" and variables_in(own[key])]
    if problems:
        raise ConfigError(problems)
    own.update({"Providers": providers} if providers else {})
    replaced = ("Router", "fallback", *(("Providers", "providers") if providers else ()))
    rest = {key: value for key, value in base.raw.items() if key not in replaced}
    config = parse_config({**rest, **own}, env, known_transformers())
    return config._replace(apikey=base.apikey, host=base.host, port=base.port)


def preset_values(manifest) -> dict:
    """The keys of a config that a manifest gives, with the answers to its questions filled in; none but PRESET_KEYS."""
    answers = manifest.get("userValues") or {}
    own = {key: manifest[key] for key in (*PRESET_KEYS, "providers") if key in manifest}
    values = filled(manifest.get("template") or own, answers)
    for mapping in manifest.get("configMappings") or ():
        if holds(mapping.get("when"), answers):
            put_at(values, str(mapping.get("target")), filled(mapping.get("value"), answers))
    for path, answer in answers.items():
        if "." in path or "[" in path:
            put_at(values, path, answer)
    values.setdefault("Providers", values.get("providers"))
    return {key: values[key] for key in PRESET_KEYS if values.get(key) is not None}


def filled(value, answers):
    """The value with #{id} and {{id}} replaced by the answers; one that is all of a string keeps its type. Others stay."""
    if isinstance(value, str):
        whole = QUESTION_MARK.fullmatch(value)
        if whole and (whole[1] or whole[2]) in answers:
            return answers[whole[1] or whole[2]]
        return QUESTION_MARK.sub(lambda match: str(answers.get(match[1] or match[2], match[0])), value)
    if isinstance(value, list):
        return [filled(item, answers) for item in value]
    return {key: filled(item, answers) for key, item in value.items()} if isinstance(value, dict) else value


def put_at(values, path, value) -> None:
    """Sets Providers[0].api_key in a config. ConfigError where there is no such place."""
    steps = [int(step) if step.isdecimal() else step for step in re.findall(r"[^.\[\]]+", path)]
    try:
        for step, following in zip(steps, steps[1:]):
            new = [] if isinstance(following, int) else {}
            values = values.setdefault(step, new) if isinstance(step, str) else values[step]
        if isinstance(values, dict) is isinstance(steps[-1], int):
            raise TypeError
        if isinstance(values, list) and steps[-1] == len(values):
            values.append(value)
        else:
            values[steps[-1]] = value
    except (TypeError, LookupError, AttributeError):
        raise ConfigError(["%s: there is no such place in the preset" % shown(path)]) from None


CONDITIONS = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "in": lambda a, b: a in b, "nin": lambda a, b: a not in b,
    "gt": lambda a, b: a > b, "lt": lambda a, b: a < b, "gte": lambda a, b: a >= b, "lte": lambda a, b: a <= b,
    "exists": lambda a, b: (a not in (None, "")) is (b is not False)}


def holds(when, answers) -> bool:
    """Whether all of these conditions {"field", "operator", "value"} hold."""
    def holds_one(condition):
        try:
            return CONDITIONS[condition.get("operator") or "eq"](answers.get(condition.get("field")), condition.get("value"))
        except (TypeError, KeyError, AttributeError):    # numbers beside words, an operator that nobody knows
            return False
    return all(map(holds_one, when if isinstance(when, list) else [when] if when else ()))


def own_provider(entry, at, base, owners, env, problems):
    """A preset's provider, with the key that `base` has for it at the same address; other keys it must not see."""
    if not isinstance(entry, dict):
        return entry
    url = str(resolved(entry.get("api_base_url"), env, []))
    for name in variables_in(entry):
        if origin(url) not in owners.get(name, [origin(url)] if "API_KEY" in name else ()):
            problems.append("%s: $%s is not given to %s: a preset gets a variable that you use for the same address, or one of "
                            "nobody else whose name holds API_KEY" % (at, name, origin(url) or "this address"))
    stored, unset = base.provider(str(entry.get("name"))), []
    resolved(entry.get("api_key"), env, unset)
    if stored and stored.keys and origin(stored.url) == origin(url) and (unset or not entry.get("api_key")):
        return {**entry, "api_key": stored.raw["api_key"]}
    return entry


def key_owners(base) -> dict:
    """{variable: the addresses it is for}, by the table of well-known providers and the owner's own config."""
    owners = {"GOOGLE_API_KEY": [origin("https://generativelanguage.googleapis.com")]}
    own = [(provider.url, variables_in(provider.raw)) for provider in base.providers]
    for url, names in [(row[2], [row[3]]) for row in WELL_KNOWN] + own:
        for name in names:
            owners.setdefault(name, []).append(origin(url))
    return owners


def variables_in(value) -> list:
    """The names of all variables in the strings of a JSON value."""
    names = []
    resolved(value, {}, names)
    return names


def origin(url) -> str:
    """https://host:port of a URL, '' for what is none."""
    try:
        return "%s://%s:%d" % (url.partition(":")[0].lower(), *split_host(url.lower()))
    except ValueError:
        return ""


# === 12. Process ====================================================================

LOCK_NAME, PID_NAME = ".claude-code-router%s.lock", ".claude-code-router%s.pid"    # %s: "", or "-PORT" for a further server
DRAIN_S = 20            # what turns under way get to end when the server is told to stop
STOP_S = DRAIN_S + 7    # then `stop` insists
START_S = 60            # what a server may take until it answers, on a machine that is very busy


class CommandError(Exception):
    """A command cannot do what it was asked to; the words say why, `status` is its exit status."""

    def __init__(self, words, status=1):
        super().__init__(words)
        self.status = status


class Record(NamedTuple):
    """A running server as its lock file tells it. uid, folder and suffix are where it was found, not what it says."""
    host: str
    port: int
    pid: int = 0
    start: str = ""
    command: str = ""
    instance: str = None
    config: str = ""
    config_stamp: list = []
    version: str = VERSION
    options: list = []
    is_foreground: bool = False
    is_stopping: bool = False
    uid: int = -1
    folder: str = None
    suffix: str = ""

    @property
    def url(self) -> str:
        """Where a client on this machine reaches it."""
        host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return "http://%s:%d" % ("[%s]" % host if ":" in host else host, self.port)


def run_server(config, config_path, options, env, is_detached=False) -> int:
    """Serves until it is told to stop; the exit status. options: the --host and --port that it was given."""
    import signal
    folder, warning = find_folder(env)
    become_quick(folder)
    os.umask(0o077)
    raise_file_limit()
    lock = claim(folder, config.host, config.port, config_path, "--port" in options or bool(env.get("SERVICE_PORT")))
    if type(lock) is Record:
        announce(lock, False, config, is_detached)
        return 0
    state = State(config, config_path, folder, env, None if is_detached else tell)
    server = Server(state, config.host, config.port)
    try:
        server.bind()
    except OSError as e:
        raise CommandError(bind_fault(e, config.host, config.port)) from None
    for words in filter(None, [*config.warnings, warning, lock.fault]):
        state.log("warn", words)
    uid, start, command = identity(os.getpid()) or (os.geteuid(), "", "")
    threading.excepthook = lambda failed: state.log("error", "a thread of ccr failed", error=repr(failed.exc_value),
                                                    where=where_raised(failed.exc_value))
    record = Record(config.host, server.port, os.getpid(), start, command, server.instance, config_path, stamp(config_path),
                    options=options, is_foreground=not is_detached, uid=uid, folder=folder, suffix=lock.suffix)
    inbox = open_inbox(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)    # not before the owner's code is loaded:
    lock.publish(record)                                                                # if it hangs, signals must end it
    server.serve()
    announce(record, True, config, is_detached)
    notify("READY=1\nSTATUS=serving at " + record.url, env)
    state.log("info", "started", version=VERSION, url=record.url, pid=record.pid)
    ended_by = watch(state, inbox)
    is_restart = ended_by == signal.SIGUSR2    # in place: under systemd or a terminal the process must stay the same
    is_final = shut(state, server, lock, record, inbox, is_restart)
    if is_restart and not is_final:
        words = [*quick_program(folder, "-I"), *sys.argv[1:]]    # the program as it is now, which may be a newer one
        os.execv(words[0], words)
    for number in (signal.SIGTERM, signal.SIGINT):    # one that comes while Python winds up must not change the exit status
        signal.signal(number, signal.SIG_IGN)
    return 0


def shut(state, server, lock, record, inbox, is_restart) -> bool:
    """Lets the turns under way end, for DRAIN_S; a second signal ends the waiting, and is told by True."""
    import signal
    for number in (signal.SIGHUP, signal.SIGUSR2):    # nothing to reload any more; nor while this process becomes another program
        signal.signal(number, signal.SIG_IGN)
    drained, end = [], time.monotonic() + DRAIN_S + 5

    def drain():
        drained.append(server.drain(DRAIN_S))
        os.write(inbox[1], b"\0")
    try:
        lock.publish(record._replace(is_stopping=True))
        notify("STATUS=restarting" if is_restart else "STOPPING=1", state.env)    # which would have systemd wait for the end
        threading.Thread(target=drain, daemon=True).start()
        is_final = False
        while not (drained or is_final) and time.monotonic() < end:
            is_final = next_signal(inbox, 1) in (signal.SIGTERM, signal.SIGINT)
        state.log("info", "ccr stops at once, as it was told twice" if is_final else
                  "ccr stops" if drained == [True] else "ccr stops; turns that had not ended were told so")
    finally:
        server.close()
        state.close()
        lock.release()
    return is_final or next_signal(inbox, 0) in (signal.SIGTERM, signal.SIGINT)


def become_quick(folder) -> None:
    """Goes on as the same process, but from the compiled copy: what Python needed to compile this file it would keep for ever."""
    if __name__ != "__main__" or os.path.abspath(__file__) != PROGRAM:
        return    # a compiled copy already
    words = quick_program(folder, "-I")
    if words[-1] != PROGRAM:
        sys.stdout.flush()
        try:
            os.execv(sys.executable, [*words, *sys.argv[1:]])
        except OSError:
            pass    # then as it is, with 30 MB more


def quick_program(folder, *flags) -> list:
    """The words that run this program in a third of the time, from a compiled copy in the folder, which is made if need be."""
    copy = os.path.join(folder or "", "cache", "ccr.%s.pyc" % sys.implementation.cache_tag)
    return [sys.executable, *flags, copy if folder and (is_compiled(copy) or compile_to(copy)) else PROGRAM]


def is_compiled(copy) -> bool:
    """Whether the copy was made from the program as it is now, by this Python."""
    import struct
    from importlib.util import MAGIC_NUMBER
    try:
        with open(copy, "rb") as f:
            head, info = f.read(16), os.stat(PROGRAM)
    except OSError:
        return False
    return head == MAGIC_NUMBER + struct.pack("<III", 0, int(info.st_mtime) & 0xffffffff, info.st_size & 0xffffffff)


def compile_to(copy) -> bool:
    import marshal, py_compile
    try:
        make_folder(os.path.dirname(copy))
        py_compile.compile(PROGRAM, copy, doraise=True, invalidation_mode=py_compile.PycInvalidationMode.TIMESTAMP)
        with open(copy, "rb") as f:
            return bool(marshal.loads(f.read()[16:]))
    except (OSError, py_compile.PyCompileError):
        pass
    except (EOFError, ValueError, TypeError):    # on a full disk Python writes a part of it, and says nothing
        remove(copy)
    return False


def watch(state, inbox) -> int:
    """Waits for the signal that ends the server; meanwhile the config is reloaded on SIGHUP, or when it has changed."""
    import signal
    while True:
        number = next_signal(inbox, 0.5)
        if number is None:
            state.tick()
        elif number != signal.SIGHUP:
            return number
        else:
            state.try_reload()


def open_inbox(*numbers) -> tuple:
    """A pipe that gets each signal as a byte: whichever thread the system gives it to, who waits there is woken.

    To block the signals in the other threads would do so too, but whatever the owner's code starts there would inherit that.
    """
    import signal
    inbox = os.pipe()
    os.set_blocking(inbox[1], False)
    signal.set_wakeup_fd(inbox[1])
    for number in numbers:
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)    # in case that our caller has blocked them
    return inbox


def next_signal(inbox, seconds):
    """The number of the next signal, or None if there is none within this time."""
    return os.read(inbox[0], 1)[0] if select.select(inbox[:1], [], [], seconds)[0] else None


def raise_file_limit() -> None:
    """A stream needs two descriptors; some systems give a process 256."""
    import resource
    try:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if 0 <= soft < 16384:
            resource.setrlimit(resource.RLIMIT_NOFILE, (16384 if hard == resource.RLIM_INFINITY else min(hard, 16384), hard))
    except (OSError, ValueError):
        pass    # it serves fewer streams


def announce(record, is_new, config, is_detached) -> None:
    """Says what serves: to the `ccr start` that waits for it, whose pipes are then let go, or to the terminal."""
    if is_detached:
        os.write(1, json.dumps(record._asdict()).encode() + b"\n")
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
    else:
        put("\n".join(words_of(record, is_new, config)), sys.stdout)


def words_of(record, is_new, config) -> list:
    """What `start` prints about the server that now runs."""
    lines = ["ccr %s %s at %s (PID %d)" % (record.version, "serves" if is_new else "is already running", record.url, record.pid)]
    if not is_new and list(stamp(record.config) or ()) != list(record.config_stamp or ()):
        lines.append("%s has changed since then: HOST, PORT and LOG count after `ccr restart`" % record.config)
    lines.append("default route: %s" % (config.router.get("default") or ("none",))[0])
    lines.append("log: " + (os.path.join(record.folder, "logs", "ccr-*.log") if record.folder and config.log else "none"))
    if config.is_demo:
        key = ' -H "x-api-key: $APIKEY"' if config.apikey else ""
        body = json.dumps({"model": "demo", "max_tokens": 500, "messages": [{"role": "user", "content": "Hello"}]})
        lines.append("No provider is configured (`ccr init` does that): the built-in demo answers. Try it:")
        lines.append("curl %s/v1/messages -H 'content-type: application/json'%s -d '%s'" % (record.url, key, body))
    return lines


def tell(words) -> None:
    put("\n".join("ccr: " + printable(line) for line in words.split("\n")), sys.stderr)


CONTROLS = Pattern(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text) -> str:
    """The text without what a terminal would obey."""
    return CONTROLS.sub(lambda match: "\\u%04x" % ord(match[0]), str(text))


def put(text, stream) -> None:
    """Prints, whoever reads it or not."""
    try:
        print(text, file=stream, flush=True)
    except (OSError, ValueError):
        hush(stream)


def hush(stream) -> None:
    """Nobody reads this stream any more: the rest of it goes nowhere, and raises nothing."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def bind_fault(e, host, port) -> str:
    """What is in the way of listening there, and what to do."""
    if e.errno == errno.EADDRINUSE:
        return "port %d is taken by %s; stop that, or choose another with PORT in the config or --port" % (
            port, owner_of(port) or "another program")
    return "HOST %s, PORT %d cannot be listened on: %s" % (host, port, e.strerror or e)


def owner_of(port):
    """'PID 12 (nginx -g ...)' of the process that listens on a port, where that can be seen (Linux), else None."""
    sockets = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            rows = [line.split() for line in read_text(table).splitlines()[1:]]
        except OSError:
            continue
        sockets |= {"socket:[%s]" % row[9] for row in rows if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port}
    for pid in filter(str.isdigit, os.listdir("/proc") if sockets else ()):
        try:
            if any(os.readlink("/proc/%s/fd/%s" % (pid, fd)) in sockets for fd in os.listdir("/proc/%s/fd" % pid)):
                return "PID %s (%s)" % (pid, printable(identity(int(pid))[2][:80]))
        except (OSError, TypeError):
            pass    # another user's, or gone
    return None


def notify(words, env) -> None:
    """Tells systemd (Type=notify)."""
    path = env.get("NOTIFY_SOCKET")
    if not path:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
            s.sendto(words.encode(), "\0" + path[1:] if path.startswith("@") else path)
    except OSError as e:
        tell("systemd cannot be told: %s" % e)


# --- one server: the lock and the record in it

class Lock:
    """A server's lock file, locked as long as it lives, with its Record in it and a PID file beside it. folder None: no lock."""

    def __init__(self, folder, suffix=""):
        self.folder, self.suffix, self.fd, self.fault = folder, suffix, None, None

    def take(self) -> bool:
        """False if a server that lives has it. True, with a `fault`, if there can be no lock here."""
        import fcntl
        try:
            self.fd = os.open(os.path.join(self.folder, LOCK_NAME % self.suffix), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self.fd, 0)
        except BlockingIOError:
            os.close(self.fd)
            return False
        except OSError as e:
            self.fd, self.fault = None, "there is no lock against a second server: %s" % e
        return True

    def publish(self, record) -> None:
        if self.fd is None:
            return
        try:
            os.ftruncate(self.fd, 0)
            os.pwrite(self.fd, json.dumps(record._asdict()).encode(), 0)
            save_file(os.path.join(self.folder, PID_NAME % self.suffix), "%d\n" % record.pid)
        except OSError as e:
            tell("the PID file cannot be written: %s" % e)

    def release(self) -> None:
        if self.fd is not None:
            remove(os.path.join(self.folder, PID_NAME % self.suffix))
            os.ftruncate(self.fd, 0)
            os.close(self.fd)


def claim(folder, host, port, config_path, is_port_named):
    """The Lock of a new server; or the Record of the running one that makes it needless."""
    if folder is None:
        return find_unlisted(host, port) or Lock(None)

    def attempt():
        for suffix in ("", "-%d" % port):
            lock = Lock(folder, suffix)
            if lock.take():
                return lock
            record = read_record(folder, suffix)
            if record is None or record.is_stopping or not is_alive(record):
                return None    # it is just starting or stopping: what becomes of it will be seen
            if record.config == config_path and (record.port == port or not is_port_named):
                return record
        raise CommandError("port %d is taken by the ccr (PID %d) of %s" % (port, record.pid, record.config))
    found = wait_until(attempt, STOP_S + START_S)
    if found:
        return found
    raise CommandError("another ccr holds the lock in %s and does not say where it serves" % folder)


def read_record(folder, suffix):
    """The Record in a lock file of this user's, or None."""
    try:
        with open(os.path.join(folder, LOCK_NAME % suffix), "rb", opener=open_at_once) as f:
            uid, data = os.fstat(f.fileno()).st_uid, json.loads(f.read(1 << 16))
        record = Record(**data)._replace(uid=uid, folder=folder, suffix=suffix)
        return record if os.geteuid() in (uid, 0) else None
    except (OSError, ValueError, TypeError):
        return None


def open_at_once(path, flags):
    """For open(): a pipe that somebody else has put there is no reason to wait."""
    return os.open(path, flags | os.O_NONBLOCK)


def is_held(folder, suffix) -> bool:
    """Whether a living process has the lock: the one thing about a server that cannot be out of date."""
    import fcntl
    try:
        with open(os.path.join(folder, LOCK_NAME % suffix), "rb", opener=open_at_once) as f:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def find_servers(env) -> list:
    """The Records of this user's running servers, the main one first; None for one whose record cannot be read."""
    start, end = LOCK_NAME.split("%s")
    places = [(folder, name[len(start):-len(end)]) for folder, _ in state_folders(env)
              for name in sorted(names_in(folder, r"\.claude-code-router(-\d+)?\.lock$"), key=len)]
    return [read_record(*place) for place in places if is_held(*place)]


def find_server(env, config_arg=None, port=None):
    """The Record of the running server that is meant: by its port, by its config if one was named, else the main one; or None."""
    config_path, servers = find_config(env, config_arg), find_servers(env)
    if None in servers or not servers and not find_folder(env, may_make=False)[0]:
        config = load_config(config_path, env)
        found = find_unlisted(config.host, port or config.port)
        if found or not servers:
            return found
        wait_until(lambda: None not in find_servers(env), 10)    # it is just starting
        servers = list(filter(None, find_servers(env)))
    port, is_config_named = port or env.get("SERVICE_PORT"), config_arg or env.get("CCR_CONFIG")
    wanted = [record for record in servers if (str(record.port) == str(port) if port else record.config == config_path)]
    main = [record for record in servers if not (record.suffix or port or is_config_named)]
    return next(iter(wanted + main), None)


def find_unlisted(host, port):
    """The Record of a server that had no folder to keep one in, made from its /health and its process; None."""
    record = Record(host, port)
    health = ask_health(record) or {}
    pid = health.get("pid")
    uid, start, command = type(pid) is int and identity(pid) or (None, "", "")
    if uid != os.geteuid() or not re.search(r"ccr.* start\b", command):
        return None
    return record._replace(uid=uid, start=start, command=command, pid=pid, instance=health.get("instance"))


def ask_health(record, seconds=2.0):
    """What /health says, or None. On a bare socket: `ccr status` must be quick."""
    host = record.url[7:].rpartition(":")[0].strip("[]")
    try:
        with socket.create_connection((host, record.port), seconds) as s:
            s.sendall(b"GET /health HTTP/1.0\r\nHost: %s\r\n\r\n" % record.url[7:].encode())
            value = json.loads(s.makefile("rb").read(1 << 16).partition(b"\r\n\r\n")[2])
        return value if isinstance(value, dict) else None
    except (OSError, ValueError):
        return None


def is_answering(record) -> bool:
    return (ask_health(record) or {}).get("instance") == record.instance


# --- processes

def configured(options, path, env):
    """The config of a file, with --host and --port in it."""
    config, given = load_config(path, env), dict(zip(options[::2], options[1::2]))
    host, port = given.get("--host", config.host).strip("[]"), int(given.get("--port", config.port))
    if not config.apikey and not is_loopback(host):
        raise CommandError("--host %s lets other machines in: set an APIKEY in the config first" % host)
    if not 0 <= port < 65536:
        raise CommandError("--port %d is no port: expected a whole number from 0 to 65535" % port)
    return config._replace(host=host, port=port)


def launch(config_path, options, env) -> tuple:
    """(Record, is new, Config) of a server in the background, once /health answers as this one. CommandError: what it said."""
    import subprocess
    folder, warning = find_folder(env)
    config = configured(options, config_path, env)
    for words in filter(None, [*config.warnings, warning]):
        tell("warning: " + words)
    program = [*quick_program(folder, "-I"), "start", "--detached", "--config", config_path, *options]
    child = subprocess.Popen(program, env=env, cwd="/", start_new_session=True,
                             stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if not select.select([child.stdout], [], [], STOP_S + 2 * START_S)[0]:
        child.kill()    # it hangs, in code of the owner's perhaps
    out = child.stdout.read().decode("utf-8", "replace")    # ends when the server lets go of the pipe, or dies
    try:
        record = Record(**json.loads(out.splitlines()[-1]))
    except (ValueError, TypeError, IndexError):
        words = re.sub(r"(?m)^ccr: ", "", out).strip()
        raise CommandError(words or "the server did not come up (status %s)" % child.wait()) from None
    is_new = record.pid == child.pid
    if not wait_until(lambda: is_answering(record) or is_new and child.poll() is not None, START_S):
        raise CommandError("the server (PID %d) does not answer at %s" % (record.pid, record.url))
    if is_new and child.poll() is not None:
        raise CommandError("the server (PID %d) was stopped at once" % record.pid)
    return record, is_new, config


def stop_server(record) -> str:
    """Ends a server: asks, waits for its turns to end, insists. Returns how it went; CommandError if it lives on."""
    import signal
    if not is_alive(record):
        raise CommandError("PID %d is not the server that was started here, so nothing was stopped" % record.pid)
    for number, seconds in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, 5)):
        send_signal(record, number)
        if not wait_until(lambda: not is_alive(record), 1):
            tell("waiting for PID %d to end" % record.pid)
        if wait_until(lambda: not is_alive(record), seconds):
            how = "has stopped" if number == signal.SIGTERM else "did not stop within %d s and was killed" % STOP_S
            return "ccr (PID %d) %s" % (record.pid, how)
    raise CommandError("PID %d cannot be stopped" % record.pid)


def wait_until(claim, seconds):
    """The first true answer of claim(), or its last one when the time is over."""
    end = time.monotonic() + seconds
    while True:
        answer = claim()
        if answer or time.monotonic() > end:
            return answer
        time.sleep(0.05)


def send_signal(record, number) -> None:
    """Sends a signal to the process that wrote the record, and to no other that has its number by now."""
    import signal
    if not 1 < record.pid < 1 << 22:
        raise CommandError("PID %d is no process that ccr may stop" % record.pid)
    try:
        fd = os.pidfd_open(record.pid) if hasattr(os, "pidfd_open") else None
    except OSError:
        fd = None    # an old kernel, or the process is gone
    try:
        if is_alive(record):
            signal.pidfd_send_signal(fd, number) if fd is not None else os.kill(record.pid, number)
    except ProcessLookupError:
        pass
    except PermissionError:
        raise CommandError("PID %d is another user's" % record.pid) from None
    finally:
        if fd is not None:
            os.close(fd)


def is_alive(record) -> bool:
    """Whether the process that wrote the record lives: same user, start time and command line."""
    return identity(record.pid) == (record.uid, record.start, record.command)


def identity(pid):
    """(uid, start time, command line) of a process; None if there is none. A number alone may belong to anybody by now."""
    if os.path.exists("/proc/self/stat"):
        try:
            with open("/proc/%d/stat" % pid, "rb") as f, open("/proc/%d/cmdline" % pid, "rb") as g:
                fields, words = f.read().rpartition(b")")[2].split(), g.read().replace(b"\0", b" ").decode("utf-8", "replace")
            return None if fields[0] in (b"Z", b"X") else (
                os.stat("/proc/%d" % pid).st_uid, fields[19].decode(), " ".join(words.split()))
        except (OSError, IndexError):
            return None
    import subprocess
    out = subprocess.run(["ps", "-ww", "-o", "uid=,lstart=,command=", "-p", str(pid)], stdin=subprocess.DEVNULL,
                         stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={"PATH": "/bin:/usr/bin", "LC_ALL": "C"}).stdout
    words = out.decode("utf-8", "replace").split()
    return (int(words[0]), " ".join(words[1:6]), " ".join(words[6:])) if words[6:] else None


# === 13. Commands ===================================================================

class Command(NamedTuple):
    name: str
    help: str
    arguments: tuple      # of arg(...)
    example: str
    is_raw: bool          # run gets the words after the name as a list, untouched
    run: object           # run(args) -> exit status, None for 0; args: a namespace as argparse makes it


COMMANDS = {}             # name -> Command, in the order of the help
ALIASES = {"env": "activate", "-v": "version", "--version": "version", "-h": "help", "--help": "help"}


def arg(*names, **options):
    """One argument of a command, in argparse's words: arg("--port", type=int, help="...")."""
    return names, options


def command(name, help, *arguments, example="", is_raw=False):
    """Makes the function below it the command `name`."""
    def register(run):
        COMMANDS[name] = Command(name, help, arguments, example or "ccr " + name, is_raw, run)
        return run
    return register


def run_command(words) -> int:
    """Runs the command that the first word names; its exit status."""
    if words[:1] == ["install"]:    # claude-code-router's short form
        words = ["preset", *words]
    name = ALIASES.get(words[0], words[0]) if words else "help"
    found = COMMANDS.get(name)
    if found is None:
        near = did_you_mean(name, [*COMMANDS, "env"])
        raise CommandError("there is no command %s%s; `ccr help` lists them" % (shown(name), near))
    if found.is_raw and words[1:] not in (["--help"], ["-h"]):
        return found.run(words[1:]) or 0
    return found.run(plain_arguments(found, words[1:]) or make_parser(found).parse_args(words[1:])) or (0 if words else 1)


def plain_arguments(found, words):
    """The arguments as argparse would give them, without its cost, if all are switches that are there; else None."""
    from types import SimpleNamespace
    values, switches = {}, {}
    for names, options in found.arguments:
        is_switch = options.get("action") == "store_true"
        if not names[0].startswith("-") and options.get("nargs") != "?":
            return None
        target = options.get("dest") or names[-1].lstrip("-").replace("-", "_")
        values[target] = options.get("default", False if is_switch else None)
        switches.update({name: target for name in names if is_switch})
    if not switches.keys() >= set(words):
        return None
    return SimpleNamespace(**{**values, **{switches[word]: True for word in words}})


def make_parser(found):
    """The argparse parser of a command."""
    import argparse
    parser = argparse.ArgumentParser(
        prog="ccr " + found.name, usage="ccr %s ..." % found.name if found.is_raw else None, allow_abbrev=False,
        description=found.help[0].upper() + found.help[1:] + ".", epilog="example:\n  " + found.example.replace("\n", "\n  "),
        formatter_class=argparse.RawDescriptionHelpFormatter)
    for names, options in found.arguments:
        parser.add_argument(*names, **{"help": argparse.SUPPRESS, **options})
    return parser


CONFIG_ARG = arg("--config", metavar="FILE", help="the config file (default: CCR_CONFIG, else ~/.claude-code-router/config.json)")
WHICH_SERVER = (CONFIG_ARG, arg("--port", type=int, help="its port (default: PORT in the config, else 3456)"))


@command("start", "start the server in the background",
         arg("--foreground", action="store_true", help="stay in the foreground, as for systemd"),
         arg("--detached", action="store_true"), *WHICH_SERVER,
         arg("--host", help="the address to listen on (default: HOST in the config, else 127.0.0.1)"),
         example="ccr start --port 3457")
def start(args):
    env, path, options = dict(os.environ), find_config(os.environ, args.config), options_of(args)
    if args.detached or args.foreground or env.get("SYSTEMD_EXEC_PID") == str(os.getpid()):
        return run_server(configured(options, path, env), path, options, env, args.detached)
    print("\n".join(words_of(*launch(path, options, env))))


def options_of(args) -> list:
    pairs = (("--port", args.port), ("--host", getattr(args, "host", None)))
    return [word for name, value in pairs if value is not None for word in (name, str(value))]


@command("stop", "stop the server; turns under way get %d seconds to end" % DRAIN_S, *WHICH_SERVER)
def stop(args):
    record = find_server(os.environ, args.config, args.port)
    print(stop_server(record) if record else "ccr is not running" + remove_stale(os.environ))


def remove_stale(env) -> str:
    """Removes the PID file of a server that is no more, and tells so; whatever process it names is left alone."""
    paths = [os.path.join(folder, PID_NAME % "") for folder, _ in state_folders(env) if not is_held(folder, "")]
    stale = list(filter(os.path.lexists, paths))
    for path in stale:
        remove(path)
    return " (its old PID file is removed)" if stale else ""


@command("restart", "check the config, then stop the server and start it again", *WHICH_SERVER)
def restart(args):
    import signal
    env, (record, path) = dict(os.environ), server_and_config(os.environ, args.config, args.port)
    options = record and record.options or options_of(args)
    config = configured(options, path, env)    # one with faults, or a port that is taken, leaves the running server alone
    try:
        if record and config.port != record.port:
            family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
            socket.create_server((config.host, config.port), family=family).close()
    except OSError as e:
        raise CommandError(bind_fault(e, config.host, config.port)) from None
    if record and record.is_foreground:
        send_signal(record, signal.SIGUSR2)
        print("\n".join(words_of(await_restart(record), True, config)))
        return
    if record:
        stop_server(record)
    print("\n".join(words_of(*launch(path, options, env))))


def await_restart(old):
    """The Record of a server that restarts in place."""
    def attempt():
        new = read_record(old.folder, old.suffix)
        return new if new and new.instance != old.instance and is_answering(new) else identity(old.pid) is None
    found = wait_until(attempt, STOP_S + START_S)
    if type(found) is Record:
        return found
    raise CommandError("the server (PID %d) did not come back; `ccr logs` says more" % old.pid)


def server_and_config(env, config_arg=None, port=None) -> tuple:
    """(the Record of the running server that is meant, or None; the path of its config, or of the one it would have)."""
    record = find_server(env, config_arg, port)
    return record, record and record.config or find_config(env, config_arg)


@command("status", "say whether the server runs, and how it does; exit status 0 if it does, 3 if not",
         arg("--json", action="store_true", help="for programs"), *WHICH_SERVER, example="ccr status --json")
def status(args):
    record, path = server_and_config(os.environ, args.config, args.port)
    health = record and ask_health(record) or {}
    is_running = bool(health) and health.get("instance") == record.instance
    facts = {"running": is_running, "pid": None, "url": None, **(health if is_running else {})}
    if record:
        folder = record.folder and os.path.join(record.folder, "logs")
        newest = [os.path.join(folder, name) for name in log_files(folder)[-1:]]
        facts.update(pid=record.pid, url=record.url, log=newest[0] if newest else None)
    facts.update(config_facts(path, os.environ, record))
    print(json.dumps(facts, indent=2) if args.json else "\n".join(map(printable, status_lines(facts, record))))
    return 0 if is_running else 3


def config_facts(path, env, record) -> dict:
    """What the config file says now."""
    facts = {"config": path, "problems": [], "warnings": [], "routes": {}, "models": []}
    try:
        config = load_config(path, env)
    except ConfigError as e:
        return {**facts, "problems": e.problems}
    routes = {rule: list(targets) for rule, targets in config.router.items() if isinstance(targets, tuple)}
    warnings = [*config.warnings, *unlike_here(record, config, env)]
    return {**facts, "warnings": warnings, "default": (routes.get("default") or [None])[0], "routes": routes,
            "models": [target_name((provider, model.name)) for provider in config.providers for model in provider.models]}


def unlike_here(record, config, env) -> list:
    """A warning if the running server (a Record or None) lacks this shell's value of a variable that the config names."""
    try:
        with open("/proc/%d/environ" % (record.pid if record else 0), "rb") as f:
            there = b"\0" + f.read()
    except OSError:
        return []    # no server, or no Linux
    names = [name for name in dict.fromkeys(variables_in(config.raw)) if env.get(name)]
    names = [name for name in names if os.fsencode("\0%s=%s\0" % (name, env[name])) not in there]
    how = "start it anew" if record and record.is_foreground else "`ccr restart` gives it that"
    return ["the running server does not have this shell's %s: %s" % (", ".join(names), how)] if names else []


def status_lines(facts, record) -> list:
    if facts["running"]:
        first = "ccr %s is running at %s (PID %d, up %s)" % (
            facts.get("version"), facts["url"], facts["pid"], duration(facts.get("uptime_s") or 0))
    elif record:
        how = "is stopping" if record.is_stopping else "runs, but does not answer at " + record.url
        first = "ccr (PID %d) %s" % (record.pid, how)
    else:
        first = "ccr is not running; `ccr start` starts it"
    routes = facts["routes"] or {"default": [facts.get("default") or ""]}
    served = facts["running"] and "%d requests, %d errors" % (facts.get("requests") or 0, facts.get("errors") or 0)
    rows = [*((rule, ", then ".join(targets)) for rule, targets in routes.items()), ("models", ", ".join(facts["models"])),
            ("served", served), ("last error", facts.get("last_error")), ("log", facts.get("log")), ("config", facts["config"]),
            *(("fault", words) for words in facts["problems"]), *(("warning", words) for words in facts["warnings"])]
    return [first, *("%-15s%s" % (name + ":", words) for name, words in rows if words)]


def duration(seconds) -> str:
    """5 s, 12 min, 3 h 20 min, 2 d 4 h"""
    minutes = seconds // 60
    if minutes < 60:
        return "%d min" % minutes if minutes else "%d s" % seconds
    return "%d h %d min" % divmod(minutes, 60) if minutes < 1440 else "%d d %d h" % divmod(minutes // 60, 24)


# --- Claude Code

IN_THE_WAY = ("ANTHROPIC_API_KEY", "CLAUDE_CODE_USE_BEDROCK", "CLAUDE_CODE_USE_VERTEX", "CLAUDE_CODE_USE_FOUNDRY")
CLAUDE_PLACES = ("~/.local/bin", "~/.claude/local", "~/.npm-global/bin", "/DATA/.local/*/bin", "/DATA/bin")


@command("code", "run Claude Code through ccr; all that follows goes to `claude` as it is", is_raw=True,
         example='ccr code\nccr code -p "Fix the bug" --max-turns 5\nccr code --preset NAME')
def code(words):
    env, (record, path) = dict(os.environ), server_and_config(os.environ)
    config = load_config(path, env)
    place, preset = "", {}
    if words[:1] == ["--preset"] and len(words) > 1:
        manifest = load_manifest(preset_file(env, words[1]))
        config, preset = preset_config(manifest, config, env), preset_settings(manifest)
        place, words = "/preset/" + words[1], words[2:]
    program = find_claude(config, env)
    if program is None:
        raise CommandError("claude was not found, neither by CLAUDE_PATH nor in PATH, %s. Install it: "
                           "npm install -g @anthropic-ai/claude-code" % ", ".join(CLAUDE_PLACES), 127)
    if record is None or record.is_stopping:
        record = launch(path, [], env)[0]
    for words in unlike_here(record, config, env):
        tell("warning: " + words)
    become(program, words, record.url + place, config, preset, env)


def become(program, words, url, config, preset, env) -> None:
    """Turns this process into claude: no shell, its arguments and stdin as they are, its exit status ours."""
    import signal
    changes = client_env(url, config, env)
    if config.non_interactive:
        changes.update(CI="true", FORCE_COLOR="0", NODE_NO_READLINE="1", TERM="dumb")
    words = with_settings(words, merged_settings(preset, own_settings(changes, config, find_folder(env)[0])), env)
    secrets = real_secrets(config) - {config.apikey}    # what claude runs needs no provider's key, but `ccr statusline` its own
    child = {**{name: value for name, value in env.items() if value not in secrets}, **changes}
    child = {name: value for name, value in child.items() if value is not None}
    for number in (signal.SIGPIPE, signal.SIGXFSZ):    # Python ignores them, and claude would inherit that
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execve(program, ["claude", *words], child)
    except OSError as e:
        raise CommandError("%s cannot be run: %s" % (program, e.strerror), 126) from None


def client_env(url, config, env) -> dict:
    """What a client needs in its environment: {name: value}, None for what would get in its way."""
    host = url[7:].partition("/")[0].rpartition(":")[0]
    old = dict.fromkeys([*env.get("NO_PROXY", "").split(","), *env.get("no_proxy", "").split(",")])
    exempt = ",".join([*(name for name in old if name not in ("", host)), host])
    changes = {"ANTHROPIC_BASE_URL": url, "ANTHROPIC_AUTH_TOKEN": config.apikey or "ccr", "NO_PROXY": exempt,
               **({"no_proxy": exempt} if "no_proxy" in env else {}),
               "API_TIMEOUT_MS": str(round(config.timeout_s * 1000)),
               "DISABLE_TELEMETRY": "true", "DISABLE_COST_WARNINGS": "true",
               "CLAUDE_CODE_GATEWAY_HINT_HEADERS": "1", "CLAUDE_CODE_ENABLE_GATEWAY_MODEL_DISCOVERY": "1"}
    target = config.target((config.router.get("default") or ("",))[0])
    context = target and (target[0].model(target[1]).context or target[0].context)
    if context and "CLAUDE_CODE_MAX_CONTEXT_TOKENS" not in env:
        changes["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] = str(context)
    small = config.raw.get("ANTHROPIC_SMALL_FAST_MODEL") or ("claude-haiku-5-5" if config.router.get("background") else None)
    if small and not {"ANTHROPIC_SMALL_FAST_MODEL", "ANTHROPIC_DEFAULT_HAIKU_MODEL"} & set(env):
        changes["ANTHROPIC_SMALL_FAST_MODEL"] = str(small)
    return {**changes, **dict.fromkeys(IN_THE_WAY)}


def own_settings(changes, config, folder) -> dict:
    """The settings for claude: they win over the `env` of the user's own settings.json, which wins over the environment."""
    import shlex
    settings = {"env": {name: value or "" for name, value in changes.items()},
                "permissions": {"disableAutoMode": "disable"}}    # its safety check runs on Anthropic's server only
    if config.status_line.get("enabled"):
        words = [*quick_program(folder, "-I", "-S"), "statusline", *re.findall(r"/preset/(.+)", changes["ANTHROPIC_BASE_URL"])]
        settings["statusLine"] = {"type": "command", "padding": 0, "command": shlex.join(words)}
    return settings


def with_settings(words, settings, env) -> list:
    """claude's arguments with our settings among them, in a private file; the user's own --settings are merged in and win."""
    flags = words[:words.index("--")] if "--" in words else words
    own = [i for i, word in enumerate(flags) if word.split("=")[0] == "--settings"]
    if not own:
        return ["--settings", save_settings(settings, env), *words]
    at = own[-1]
    _, has_value, value = words[at].partition("=")
    value = value if has_value else "".join(words[at + 1:at + 2])
    try:
        theirs = parse_json5(value if value.lstrip().startswith("{") else read_text(value))
    except (OSError, ValueError, ConfigError):
        return words    # claude says better what is wrong with it
    if not isinstance(theirs, dict) or not isinstance(theirs.get("env", {}), dict):
        return words
    merged = merged_settings(settings, theirs)
    for name in ("ANTHROPIC_BASE_URL", "ANTHROPIC_AUTH_TOKEN", *IN_THE_WAY):    # else it would not be `ccr code`
        merged["env"][name] = settings["env"][name]
    return words[:at] + ["--settings", save_settings(merged, env)] + words[at + (1 if has_value else 2):]


def merged_settings(a, b) -> dict:
    """Two settings in one; where both say something, b is right."""
    both = [key for key in ("env", "permissions") if isinstance(a.get(key), dict) and isinstance(b.get(key), dict)]
    return {**a, **b, **{key: {**a[key], **b[key]} for key in both}}


def save_settings(settings, env) -> str:
    """A private file for settings, the same for the same ones; or, where none can be written, their text without the token."""
    import hashlib
    folder, text = find_folder(env)[0], json.dumps(settings, indent=1, sort_keys=True)
    try:
        for old in (os.path.join(folder, name) for name in names_in(folder, r"claude-settings-[0-9a-f]{16}\.json$")):
            if time.time() - os.stat(old).st_mtime > 30 * 86400:
                remove(old)
        path = os.path.join(folder or "", "claude-settings-%s.json" % hashlib.sha256(text.encode()).hexdigest()[:16])
        if folder:
            save_file(path, text)
            return path
    except OSError as e:
        tell("warning: the settings for claude cannot be written: %s" % e)
    public = {name: value for name, value in settings["env"].items() if name != "ANTHROPIC_AUTH_TOKEN"}
    return json.dumps({**settings, "env": public})


def find_claude(config, env):
    """The path of the program `claude`, or None."""
    import glob, shutil
    places = [folder for place in CLAUDE_PLACES for folder in sorted(glob.glob(os.path.expanduser(place)))]
    path = os.pathsep.join([env.get("PATH") or os.defpath, *places])
    names = filter(None, (config.claude_path, env.get("CLAUDE_PATH"), "claude"))
    return next(filter(None, (shutil.which(os.path.expanduser(name), path=path) for name in names)), None)


@command("activate", "print what a shell needs for plain `claude` to go through ccr (also: env)", CONFIG_ARG,
         example='eval "$(ccr activate)"')
def activate(args):
    import shlex
    record, path = server_and_config(os.environ, args.config)
    config = load_config(path, os.environ)
    url = (record or Record(config.host, config.port)).url
    for name, value in client_env(url, config, os.environ).items():
        print("unset " + name if value is None else "export %s=%s" % (name, shlex.quote(value)))
    if record is None:
        tell("the server is not running: `ccr start` starts it")


# --- the log, the version, the help

@command("logs", "print the log in readable lines", arg("-f", "--follow", action="store_true", help="go on printing what comes"),
         arg("-n", "--lines", type=int, default=20, help="how many of the last lines (20)"), example="ccr logs -f -n 100")
def logs(args):
    *older, newest = log_paths(os.environ) or [None]
    if newest is None:
        raise CommandError("there is no log yet")
    lines, at = read_lines(newest)
    while older and len(lines) < args.lines:
        lines = read_lines(older.pop())[0] + lines
    lines = lines[max(0, len(lines) - args.lines):]
    while True:
        for line in lines:
            print(line, flush=True)
        if not args.follow:
            return
        time.sleep(0.2)
        last, newest = newest, (log_paths(os.environ) or [newest])[-1]
        lines, at = read_lines(last, at)
        if newest != last:
            more, at = read_lines(newest)
            lines += more


def log_paths(env) -> list:
    """The log files of this user, oldest first."""
    folder = next(filter(log_files, (os.path.join(place, "logs") for place, _ in state_folders(env))), "")
    return [os.path.join(folder, name) for name in log_files(folder)]


def read_lines(path, at=0) -> tuple:
    """(The whole lines of a log file from byte `at` on, readable; where they end.)"""
    try:
        with open(path, "rb") as f:
            f.seek(at)
            data = f.read()
    except FileNotFoundError:    # its owner has made room
        return [], 0
    whole = data[:data.rfind(b"\n") + 1]
    return list(filter(None, map(readable, whole.decode("utf-8", "replace").split("\n")))), at + len(whole)


def readable(line):
    """A log line for people, or None if it is not one of ours."""
    try:
        record = json.loads(line)
        clock = local_time(record["time"])
    except (ValueError, TypeError, KeyError):
        return None
    if "message" in record:
        rest = ["%s=%s" % pair for pair in record.items() if pair[0] not in ("time", "level", "message")]
        return printable(" ".join([clock, record.get("level", ""), record["message"], *rest]))
    said = collections.defaultdict(lambda: "-", {key: value for key, value in record.items() if value is not None}, time=clock)
    text = ("%(time)s %(status)s %(rule)s: %(asked)s -> %(provider)s,%(model)s, %(ms)s ms (first after %(first_ms)s), "
            "tokens %(input_tokens)s in (%(cached_tokens)s cached) %(output_tokens)s out") % said
    text += "".join("; %s failed: %s" % (failed.get("model"), failed.get("error")) for failed in record.get("fallbacks") or ())
    return printable(text + ("; error: %s" % record["error"] if record.get("error") else ""))


def local_time(text) -> str:
    """2026-11-25T17:20:47.123Z -> the same moment as 2026-11-25 18:20:47 of this machine."""
    import calendar
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(calendar.timegm(time.strptime(text[:19], "%Y-%m-%dT%H:%M:%S"))))


@command("version", "print the version (also: -v, --version)")
def version(args):
    print("ccr " + VERSION)


@command("help", "print this list (also: -h, --help)")
def help_command(args):
    print("ccr %s: Claude Code with any model\n\nusage: ccr COMMAND ...\n" % VERSION)
    for found in COMMANDS.values():
        print("  %-12s%s" % (found.name, found.help))
    print("\n`ccr COMMAND --help` tells more. The server logs to ~/.claude-code-router/logs, and its page is at /ui/.")


# --- explain

@command("explain", "show how a request would be routed and sent, without sending it",
         arg("file", metavar="FILE", help="a request body as JSON, - for standard input"), WHICH_SERVER[0],
         arg("--as", dest="ingress", choices=("anthropic", "openai", "responses"), default="anthropic",
             help="the format it is in"),
         example="ccr explain request.json\n"
                 "echo '{\"messages\": [{\"role\": \"user\", \"content\": \"ultrathink\"}]}' | ccr explain -")
def explain(args):
    path = find_config(os.environ, args.config)
    state = State(load_config(path, os.environ)._replace(log=False), path, find_folder(os.environ)[0], dict(os.environ))
    try:
        text = sys.stdin.read() if args.file == "-" else read_text(args.file)
    except (OSError, ValueError) as e:
        raise CommandError("%s: %s" % (args.file, getattr(e, "strerror", None) or e))
    body = parse_body(text.encode("utf-8", "surrogateescape"))
    for line in explained(Rehearsal(state, FORMATS[args.ingress], body, {})):
        print(state.scrub(line))


class Rehearsal(Exchange):
    """A turn that ends where its first call would be sent."""

    def open_events(self, provider, model, request=None):
        self.call = prepare(self, provider, model, request)
        raise ClientGone()

    def first_call(self, provider, model) -> Call:
        self.request = sighted(self, provider, model,
                               lambda turn, lookers, *_: "[an image, as %s describes it]" % target_name(lookers[0]))
        try:
            next(searched(self, provider, model))
        except ClientGone:
            return self.call


def explained(turn):
    """Lines: every rule tried and its answer, the estimate of tokens, and the call as it would be sent, keys hidden."""
    for rule, target, reason in explain_route(turn.turn(), turn.config):
        yield "%s %-12s %-28s %s" % ("->" if target else "  ", rule, target or "-", reason or "passes on")
    (provider, model), *others = turn.choose_targets()
    yield from ("", "rule      %s: %s" % (turn.route.rule, turn.route.reason), "model     %s" % target_name((provider, model)),
                "fallbacks %s" % (", ".join(map(target_name, others)) or "none"), "tokens    about %d" % turn.tokens(model), "")
    if turn.config.is_demo:
        return (yield "the built-in demo answers; nothing is sent")
    call = turn.first_call(provider, model)
    yield "POST " + call.url
    yield from map("%s: %s".__mod__, {**call.headers, **call.egress.auth("***" if provider.keys else None)}.items())
    yield from ("", json.dumps(call.body, indent=2, ensure_ascii=False))


# --- the terminal: asking and showing

COLOURS = "black red green yellow blue magenta cyan white".split()
STYLES = {"bold": "1", "dim": "2", **{name: str(30 + i) for i, name in enumerate(COLOURS)},
          **{"bright_" + name: str(90 + i) for i, name in enumerate(COLOURS)}, "gray": "90", "grey": "90"}
A_KEY = Pattern(rb"\x1b(\[[0-9;]*[A-Za-z~]|O[A-Za-z]|[^\[O])|"    # an escape sequence, or a character in UTF-8
                rb"[^\x1b\xc0-\xff]|[\xc0-\xdf].|[\xe0-\xef]..|[\xf0-\xff]...", re.S)
KEYS = {"\x1b[A": "up", "\x1bOA": "up", "\x1b[B": "down", "\x1bOB": "down", "\r": "enter", "\n": "enter",
        "\x7f": "back", "\x08": "back", "\x1b": "leave", "\x04": "leave", "": "leave"}
NO_CHANGE = "nothing was changed"


def can_ask(config) -> bool:
    """Whether somebody is there to be asked: a terminal at both ends, and no NON_INTERACTIVE_MODE."""
    return sys.stdin.isatty() and sys.stdout.isatty() and not config.non_interactive


def has_cursor() -> bool:
    return os.environ.get("TERM", "") not in ("", "dumb", "unknown")


def paint(text, style) -> str:
    """The text in this style, on a terminal that shows it and with nobody against it."""
    is_shown = text and sys.stdout.isatty() and has_cursor() and not os.environ.get("NO_COLOR")
    return "\x1b[%sm%s\x1b[0m" % (STYLES[style], text) if is_shown else text


def screen() -> tuple:
    """(columns, lines) of the terminal; a file or pipe is wide."""
    try:
        width, height = os.get_terminal_size(1)
        return width or 80, height or 24
    except (OSError, ValueError):
        return 200, 24


def cells(text) -> int:
    """How many columns of a terminal the text takes."""
    from unicodedata import combining, east_asian_width
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return sum(0 if combining(char) else 2 if east_asian_width(char) in "WF" else 1 for char in plain)


def clipped(text, width) -> str:
    """The text in at most `width` columns; of what is too long the middle is left out."""
    keep = max(width - 3, 0)
    while cells(text) > width:
        text, keep = text[:keep // 2] + "..."[:width] + text[len(text) - (keep - keep // 2):], keep - 1
    return text


def columns(rows, right=(), elastic=()) -> list:
    """Lines with these cells in columns, the numbers of those in `right` set to the right.

    Where a line would not fit the terminal, the columns in `elastic` give way in this order.
    """
    widths = [max(map(cells, column)) for column in zip(*rows)]
    for i in elastic if rows else ():
        excess = sum(widths) + 2 * len(widths) - 2 - screen()[0]
        widths[i] -= max(0, min(excess, widths[i] - 12))
    lines = []
    for row in rows:
        texts = [clipped(text, widths[i]) if i in elastic else text for i, text in enumerate(row)]
        spaces = [" " * (widths[i] - cells(text)) for i, text in enumerate(texts)]
        lines.append("  ".join(space + text if i in right else text + space
                               for i, (text, space) in enumerate(zip(texts, spaces))).rstrip())
    return lines


def table(rows, right=(), elastic=()) -> list:
    """The same, the first row being the head."""
    head, *lines = columns(rows, right, elastic)
    return [paint(head, "dim"), *lines]


class Option(NamedTuple):
    label: str
    note: str = ""
    value: object = None


def choose(title, options, typed=None):
    """The value of the option that the user takes, by arrows, typing or number; CommandError if they leave.

    typed: a function that makes an Option of a text that is none of them.
    """
    found = (pick if has_cursor() else pick_number)(title, options, typed)
    print(printable("%s: %s" % (title, found.label)))
    return found.value


def matching(options, text, typed) -> list:
    """The options with all of these words; and what was typed, if that is asked for."""
    found = [option for option in options if all(word in option.label.lower() for word in text.lower().split())]
    return found + [typed(text)] if typed and text and text not in [option.label for option in options] else found


def pick(title, options, typed):
    """The Option that is taken from a list on the terminal, which then looks as before."""
    import signal, termios
    for number in (signal.SIGTERM, signal.SIGHUP):    # they end it too, but not before the terminal is as it was
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    before, mode, text, at = termios.tcgetattr(0), termios.tcgetattr(0), "", 0
    mode[3] &= ~(termios.ECHO | termios.ICANON)
    try:
        termios.tcsetattr(0, termios.TCSADRAIN, mode)
        while True:
            found = matching(options, text.strip(), typed)
            at = max(0, min(at, len(found) - 1))
            draw(title, text, found, at)
            key = read_key()
            if key == "enter" and found:
                return found[at]
            if key == "leave":
                raise CommandError(NO_CHANGE)
            at += {"up": -1, "down": 1}.get(key, 0)
            if key == "back" or len(key) == 1:
                text, at = text[:-1] if key == "back" else text + key, 0
    finally:
        sys.stdout.write("\r\x1b[J")
        sys.stdout.flush()
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def draw(title, text, found, at) -> None:
    """Draws the list below the line with the title, and leaves the cursor after what was typed there."""
    width, height = screen()
    height = max(3, min(12, height - 4))
    first = max(0, min(at - height // 2, len(found) - height))
    rows = [("> " if i == at else "  ") + printable(option.label) for i, option in enumerate(found)]
    lines = columns(list(zip(rows, [printable(option.note) for option in found])), elastic=(1, 0))[first:first + height]
    lines = [paint(clipped(line, width), "cyan") if line.startswith(">") else clipped(line, width) for line in lines]
    count = "%d of %d" % (at + 1, len(found)) if found else "nothing like that"
    lines.append(paint(clipped("  %s; type to filter, Enter takes, Esc leaves" % count, width - 1), "dim"))
    head = "%s: %s" % (clipped(title, width // 2), text[4 - width // 2:])
    sys.stdout.write("\r\x1b[J%s\x1b[%dA\r\x1b[%dC" % ("\r\n".join([paint(head, "bold"), *lines]), len(lines), cells(head)))
    sys.stdout.flush()


def read_key() -> str:
    """One key: its name in KEYS or its character. Never more, so that what is typed ahead waits for its question."""
    data = os.read(0, 1)
    while data and not A_KEY.match(data) and select.select([0], [], [], 0.05)[0]:
        data += os.read(0, 1)
    text = data.decode("utf-8", "replace")
    return KEYS.get(text, text if len(text) == 1 and text.isprintable() else "other")


def pick_number(title, options, typed):
    """The same on a terminal without a cursor: a list with numbers."""
    found = options
    while True:
        print("\n".join("%4d  %s  %s" % (i, printable(label), printable(note)) for i, (label, note, _) in enumerate(found, 1)))
        text = ask_line("%s (a number, or part of a name)" % title)
        if text.isdecimal() and 0 < int(text) <= len(found):
            return found[int(text) - 1]
        found = matching(options, text, typed)
        if len(found) == 1:
            return found[0]
        if not found:
            print("nothing like that")
            found = options


def ask_line(question, default="", fault_of=lambda text: None, is_secret=False) -> str:
    """What the user types, or the default for nothing; asked again while it has a fault. CommandError at the end of input."""
    from getpass import getpass
    words = question + (" [%s]" % default if default and not is_secret else "") + ": "
    while True:
        try:
            text = (getpass if is_secret else input)(words).strip() or default
        except EOFError:
            raise CommandError(NO_CHANGE) from None
        fault = fault_of(text)
        if not fault:
            return text
        print(printable(fault))


def says_yes(question, default="n") -> bool:
    return ask_line(question + " (y/n)", default).lower() in ("y", "yes")


def in_parallel(work, items):
    """(item, work(item)) of each, as they are ready; leaving early does not wait for the others."""
    import queue
    done = queue.SimpleQueue()

    def run(item):
        try:
            done.put((item, work(item)))
        except Exception as e:
            done.put(e)
    for item in items:
        threading.Thread(target=run, args=(item,), daemon=True).start()
    for _ in items:
        found = done.get()
        if isinstance(found, Exception):
            raise found
        yield found


# --- a config to be edited

def quiet_state(config, path) -> State:
    """The State of a command: it keeps no log and no folder."""
    return State(config._replace(log=False), path, None, dict(os.environ))


class Desk:
    """A config file as commands edit it; to the functions behind the page it is what a server is."""

    def __init__(self, path, config=None):
        self.path, self.state = path, quiet_state(config or load_config(path, os.environ), path)
        self.source = read_source(self)
        self.raw = self.source.raw
        self.key = "Providers" if self.raw.get("Providers") or "providers" not in self.raw else "providers"
        self.entries = self.raw[self.key] if isinstance(self.raw.get(self.key), list) else []

    def check(self, raw):
        """The Config of this value; ConfigError with its faults."""
        config, faults = check_config(self, raw)
        if faults:
            raise ConfigError(faults)
        return config

    def save(self, raw) -> None:
        """Writes the file, changed as little as possible, and tells whether the running server goes by it."""
        config, text = self.check(raw), edit_json5(self.source.text, raw)
        if read_source(self).version != self.source.version:
            raise CommandError("%s was changed by somebody else meanwhile; nothing was written" % self.path)
        try:
            save_config(self.path, text)
        except (OSError, ValueError) as e:
            raise CommandError("%s cannot be written: %s" % (self.path, getattr(e, "strerror", None) or e)) from None
        say_on_screen([words for words in config.warnings if words not in self.state.config.warnings])
        print("saved: %s\n%s" % (self.path, taken_over(self.path)))
        say_on_screen(unlike_here(server_of(self.path), config, os.environ))


def server_of(path):
    """The Record of the running server with this config, or None."""
    return next((record for record in find_servers(os.environ) if record and record.config == path), None)


def say_on_screen(warnings) -> None:
    for words in warnings:
        print(paint("warning: ", "yellow") + printable(words))


def taken_over(path) -> str:
    """Has the running server read its config now, and asks it whether it goes by it."""
    import signal
    record = server_of(path)
    if record is None:
        return "the server is not running; `ccr start` starts it"
    send_signal(record, signal.SIGHUP)
    until = time.monotonic() + 5
    while time.monotonic() < until:
        if tuple((ask_health(record) or {}).get("config_stamp") or ()) == stamp(path):
            return "the server at %s goes by it now" % record.url
        time.sleep(0.05)
    return "the server at %s has NOT taken it over: `ccr logs` says why" % record.url


def with_route(raw, rule, targets) -> dict:
    """The config with this route: one target replaces the first of a list and keeps its fallbacks, none removes the route."""
    router = dict(raw.get("Router") or {})
    old = router.pop(rule, None)
    if len(targets) == 1 and isinstance(old, list):
        targets = [targets[0], *(target for target in old[1:] if target != targets[0])]
    new = {rule: targets if targets[1:] else targets[0]} if targets else {}
    return {**raw, "Router": {**router, **new}}


def with_model(desk, entry, model) -> dict:
    """The config with a model of listed_models() in the list of this provider's entry, which may be a new one."""
    item = model if model.get("context") else model["name"]
    longer = {**entry, "models": [*(entry.get("models") or ()), item]}
    entries = [longer if each == entry else each for each in desk.entries]
    return {**desk.raw, desk.key: entries if longer in entries else [*entries, longer]}


def told_models(state, provider, timeout_s=8) -> list:
    """The models that a provider itself lists, those that chat; ApiError."""
    try:
        models = listed_models(open_json(state, provider, models_url(provider), timeout_s))
    except ApiError as e:
        raise safe(e, state, provider)
    return [model for model in models if not re.search(NO_CHAT, model["name"], re.I)]


def safe(error, state, provider):
    """The error without keys, which providers like to repeat, and without what a terminal would obey."""
    keys = {key for key in provider.keys if len(key) >= 8}
    error.message = printable(scrubber(keys.union(state.secrets))(error.message))
    return error


# --- model

RULE_WORDS = {
    "default": "what no other route claims", "background": "titles, summaries, haiku", "think": "plan mode, high effort",
    "longContext": "long conversations", "webSearch": "Claude Code's web search", "image": "messages with an image",
    **{tier: "Claude Code's " + tier for tier in TIERS}}


@command("model", "show or choose which model does what; add models and providers",
         arg("rule", metavar="ROUTE", nargs="?", help="a key of Router"),
         arg("targets", metavar="PROVIDER,MODEL", nargs="*", help="its model, and those that stand in for it; or `none`"),
         WHICH_SERVER[0], example="ccr model\nccr model default ollama,kimi-k2.6\nccr model think none")
def model(args):
    desk = Desk(find_config(os.environ, args.config))
    config, rule = desk.state.config, next((rule for rule in ROUTES if rule.lower() == (args.rule or "").lower()), None)
    if args.rule and not rule:
        hint = did_you_mean(args.rule, ROUTES)
        raise CommandError("there is no route %s%s; there are %s" % (shown(args.rule), hint, ", ".join(ROUTES)))
    if args.targets:
        desk.save(with_route(desk.raw, rule, [route_target(config, text) for text in args.targets if text != "none"]))
    elif can_ask(config):
        choose_model(desk, rule)
    else:
        rows = [(each, printable(", then ".join(config.router.get(each, "-"))), RULE_WORDS[each])
                for each in ([rule] if rule else [each for each in ROUTES if each in config.router])]
        names = [] if rule else ["", "models: " + printable(", ".join(map(target_name, all_targets(config))))]
        print("\n".join([*table([("ROUTE", "MODEL", "FOR"), *rows], elastic=(2, 1)), *names]))


def route_target(config, text) -> str:
    target = config.target(text) or config.owner(text.strip())
    if target is None:
        name, comma, _ = text.partition(",")
        raise CommandError(no_provider(name.strip(), config) if comma else "expected PROVIDER,MODEL, got %s" % shown(text))
    return target_name(target)


def all_targets(config) -> list:
    return [(provider, model.name) for provider in config.providers for model in provider.models]


def choose_model(desk, rule) -> None:
    """The dialogue: a route and its model, or a new model and its route; then it is saved."""
    config, raw = desk.state.config, desk.raw
    real = () if config.is_demo else config.providers
    now = {each: ", then ".join(config.router.get(each, "-")) for each in ROUTES}
    routes = [Option(each, "%s  (%s)" % (now[each], RULE_WORDS[each]), each) for each in ROUTES]
    new = [Option("+ add a model of " + each.name, each.url, each) for each in real]
    new.append(Option("+ add a provider", "step by step"))
    target = rule or choose("Change", [*(routes if real else ()), *new])
    if target in ROUTES:
        rule = target
        options = [Option(name, "", name) for name in map(target_name, all_targets(config) if real else ())]
        none = [Option("none", "leave it to the default", "")] if rule in config.router and rule != "default" else []
        target = choose("Model for " + rule, options + new + none)
    if type(target) is not str:
        raw, target = new_provider(desk) if target is None else asked_model(desk, target)
    if not rule:
        none = Option("no route", "only when it is named: /model " + target)
        rule = choose("Use it for", [none, *routes]) if real else "default"
    desk.save(with_route(raw, rule, [target] if target else []) if rule else raw)


def asked_model(desk, provider) -> tuple:
    """(the config with it, "provider,model") of a model that the user picks from the provider's own list, or types."""
    try:
        models = told_models(desk.state, provider)
    except ApiError as e:
        print("no list of models: %s; type the name of one" % e.message)
        models = []
    options = [Option(model["name"], "", model) for model in models]
    found = choose("Model of " + provider.name, options, lambda text: Option(text, "as typed", {"name": text}))
    is_listed = found["name"] in [model.name for model in provider.models]
    return desk.raw if is_listed else with_model(desk, provider.raw, found), "%s,%s" % (provider.name, found["name"])


def new_provider(desk) -> tuple:
    """(the config with it, "provider,model") of a provider that answered a test, or is to be saved all the same."""
    options = [Option(row[1], row[2], row) for row in WELL_KNOWN]
    name, _, url, variable = choose("Provider", [*options, Option("another one", "any other API", ("", "", "", ""))])
    key = "$" + variable if desk.state.env.get(variable) else ""
    entry = {"name": "new", "api_base_url": url or "http://x"}
    for field, question, default in [
            ("name", "Its name in routes", name),
            *([] if url else [("api_base_url", "Its URL (the endpoint, or a base that ends in /v1)", "")]),
            ("api_key", "Its key, not shown ($NAME is a variable; empty: %s)" % (key or "none"), key)]:
        def fault_of(text, field=field):
            return entry_fault(desk, {**entry, field: text})
        entry[field] = ask_line(question, default, fault_of, field == "api_key")
    entry = {field: value for field, value in entry.items() if value}
    provider = draft_provider(desk, {"provider": entry})
    raw, target = asked_model(desk, provider)
    needed = {target: {"the new route": True}}
    config = desk.check(raw)
    results, lists = probe_all(quiet_state(config, desk.path), [target])
    tell_failures(config, results, lists, needed)
    if results[target].error and not says_yes("Save it all the same?"):
        raise CommandError(NO_CHANGE)
    return raw, target


def entry_fault(desk, entry):
    """What is wrong with an entry that is being made, or None."""
    if desk.state.config.provider(entry["name"]):
        return "another provider is already called %s" % shown(entry["name"])
    try:
        draft_provider(desk, {"provider": entry})
    except ConfigError as e:
        return "; ".join(e.problems)


# --- check

TOOL = {"name": "answer", "description": "Gives the answer.",
        "input_schema": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}}
PLAIN_QUESTION = {"max_tokens": 400, "stream": True, "messages": [{"role": "user", "content": "Reply with the one word OK."}]}
TOOL_QUESTION = {**PLAIN_QUESTION, "tools": [TOOL],
                 "messages": [{"role": "user", "content": "Call the tool `answer` with the word OK."}]}
QUESTIONS = ({**TOOL_QUESTION, "thinking": {"type": "adaptive"}}, TOOL_QUESTION, PLAIN_QUESTION)


class Probe(NamedTuple):
    """What one question showed of a model. error: an ApiError or None; the others None where it showed nothing."""
    error: object = None
    first_s: float = None
    streams: bool = None
    calls: bool = None
    reasons: bool = None


@command("check", "ask each model a tiny question, say what works and what to do",
         arg("names", metavar="NAME", nargs="*", help="only these providers or models"),
         arg("--offline", action="store_true", help="only look for faults in the config"),
         WHICH_SERVER[0], example="ccr check\nccr check ollama\nccr check --offline")
def check(args):
    desk = Desk(find_config(os.environ, args.config))
    config, needed = desk.state.config, needed_by(desk.state.config)
    models = dict.fromkeys([*map(target_name, all_targets(config)), *needed])
    print(desk.path + (" is not there." if desk.source.version == "none" else " has no faults."))
    say_on_screen([*config.warnings, *unlike_here(server_of(desk.path), config, os.environ)])
    if config.is_demo:
        print("No provider is configured: the built-in demo answers. `ccr init` looks for real ones.")
    if args.offline or config.is_demo:
        return 0
    names = [name for name in models if not args.names or {name, *name.split(",", 1)} & set(args.names)]
    if not names:
        wanted = " or ".join(map(shown, args.names))
        raise CommandError("nothing is called %s; there are %s" % (wanted, ", ".join(models)))
    results, lists = probe_all(desk.state, names)
    print("\n" + "\n".join(check_table(config, results, lists, needed)))
    is_broken = tell_failures(config, results, lists, needed)
    good = "Every route works." if set(needed) <= set(names) else "What was asked works."
    print("\n" + (paint("A route is broken.", "red") if is_broken else good))
    return int(is_broken)


def needed_by(config) -> dict:
    """{"provider,model": the rules} of the models that a route or a fallback names."""
    needed = {}
    for rule, targets in [*config.router.items(), *(config.fallback or {}).items()]:
        for target in targets if isinstance(targets, tuple) else ():
            needed.setdefault(target, {})[rule] = True
    return needed


def probe_all(state, names) -> tuple:
    """({name: Probe}, {provider name: its own list of models}); a line for each answer as it comes."""
    results, width, providers, limits = {}, min(max(map(cells, names)), 40), {}, {}
    for provider, _ in map(state.config.target, names):
        is_local = is_loopback(split_host(provider.url)[0])    # it loads one model at a time, which takes its time
        providers[provider.name] = provider
        limits[provider.name] = (threading.Semaphore(1), 180) if is_local else (threading.Semaphore(4), 60)

    def result_of(name):
        provider, model = state.config.target(name)
        place, timeout_s = limits[provider.name]
        with place:
            return probe(state, provider, model, timeout_s)

    def list_of(name):
        try:
            return told_models(state, providers[name])
        except ApiError:    # not all have one; the question shows whether that matters
            return []
    print("models to ask: %d" % len(names), flush=True)
    for name, result in in_parallel(result_of, names):
        results[name] = result
        mark = paint("fail", "red") if result.error else paint("ok  ", "green")
        words = result.error.message if result.error else "first token after %.2f s" % result.first_s
        label = clipped(printable(name), width)
        label += " " * (width - cells(label))
        print("  %s  %s  %s" % (mark, label, words[:screen()[0] - width - 11]), flush=True)
    return {name: results[name] for name in names}, dict(in_parallel(list_of, list(providers)))


def probe(state, provider, model, timeout_s) -> Probe:
    """Asks for a call of a tool, with thinking; where that is refused, without thinking, then without the tool."""
    first = None
    for question in QUESTIONS:
        try:
            return probed(state, provider, model, question, timeout_s)
        except ApiError as e:
            first = first or safe(e, state, provider)    # the first words say it best
            if e.status not in (400, 404, 422):
                break
    return Probe(first)


def probed(state, provider, model, question, timeout_s) -> Probe:
    turn, kinds, end = Exchange(state, ANTHROPIC, {**question, "model": model}, {}), set(), None
    turn.watch.silence_s, turn.watch.end = timeout_s, turn.began + timeout_s
    try:
        for event in turn.ask(provider, model):
            kind = None if type(event) is Spliced else event["type"]
            if kind == "content_block_start":
                kinds.add(event["content_block"]["type"])
            elif kind == "message_delta":
                end = event["delta"].get("stop_reason")
        if not kinds:
            raise ApiError(502, "%s answered with nothing" % provider.name)
        is_stream = "event-stream" in turn.replies[-1].headers.get("content-type", "")
        calls = "tool_use" in kinds or (None if end == "max_tokens" else False)
        reasons = "thinking" in kinds if "thinking" in question else None
        return Probe(None, turn.first_at - turn.began, is_stream, calls, reasons)
    finally:
        turn.close()


def check_table(config, results, lists, needed) -> list:
    def yes(value):
        return "-" if value is None else paint("yes", "green") if value else paint("no", "yellow")
    rows = [("MODEL", "ANSWERS", "STREAMS", "TOOLS", "THINKS", "CONTEXT", "ROUTES")]
    for name, (error, first_s, *found) in results.items():
        provider, model = config.target(name)
        told = {each["name"]: each["context"] for each in lists[provider.name]}
        context = provider.model(model).context or told.get(model) or provider.context
        answers = paint("no", "red") if error else "in %.2f s" % first_s
        rows.append((printable(name), answers, *map(yes, found), str(context or "-"), " ".join(needed.get(name, ()))))
    return table(rows, right=(5,), elastic=(6, 0))


def tell_failures(config, results, lists, needed) -> bool:
    """Says of each failure what to do; whether a route needs one of them."""
    failed = sorted((name for name in results if results[name].error), key=lambda name: name not in needed)
    for name in failed:
        provider, error = config.target(name)[0], results[name].error
        rules = " and ".join(needed.get(name, ["no route"]))
        print("\n%s %s, needed by %s" % (paint("failed:", "red"), printable(name), rules))
        print("  %s\n  -> %s" % (error.message, printable(advice(error, provider, name, lists[provider.name]))))
    for name in results:
        if results[name].calls is False and set(needed.get(name, ())) - {"background"}:
            print("\n%s %s called no tool, by which Claude Code works" % (paint("note:", "yellow"), printable(name)))
            print("  -> choose another model for %s, or try the transformer \"texttools\"" % " and ".join(needed[name]))
    return any(name in needed for name in failed)


def advice(error, provider, name, listed) -> str:
    """What to do about a model that did not answer. listed: the provider's own models, as far as they are known."""
    model, names = name.partition(",")[2], [each["name"] for each in listed or ()]
    key, where = str(provider.raw.get("api_key")), "api_key of provider %s" % shown(provider.name)
    variable = re.match(r"\$\{?(\w+)", key)
    if error.status in (401, 403) and provider.keys:
        return "check the key: %s%s" % (where, " is " + key if variable else "")
    if error.status in (401, 403):
        return "set the variable %s, for the server too" % variable[1] if variable else "it wants a key: set " + where
    if names and model not in names and error.status in (400, 404, 422):
        few = names[:6] + ["..."] if names[6:] else names
        return "it does not list this model%s; it has %s" % (did_you_mean(model, names), ", ".join(few))
    if error.is_network and error.status != 504:
        return "start it, or correct api_base_url of provider %s: %s" % (shown(provider.name), provider.url)
    return ADVICE.get(error.status, "the trouble is the provider's: try later, or use another model (`ccr model`)")


ADVICE = {400: "it refuses the question as it is: check the model's name and the provider's transformers",
          402: "top up the account there", 404: "check the model's name and api_base_url",
          429: "it is busy, or a quota is used up: wait, or use another model (`ccr model`)",
          504: "is it busy, or just loading the model? try again"}

# --- init

STARTERS = {    # models to begin with: the first of a longer list, or a guess where the provider cannot be asked
    "ollama": "kimi-k2.6 deepseek-v4-pro gemma3:4b", "openrouter": "moonshotai/kimi-k2.6 anthropic/claude-sonnet-4.5",
    "deepseek": "deepseek-chat deepseek-reasoner", "gemini": "gemini-2.5-pro gemini-2.5-flash", "openai": "gpt-5 gpt-5-mini",
    "anthropic": "claude-sonnet-4-5 claude-haiku-4-5", "groq": "openai/gpt-oss-120b openai/gpt-oss-20b", "moonshot": "kimi-k2.6",
    "mistral": "devstral-medium-latest mistral-small-latest", "zai": "glm-4.6 glm-4.5-air", "cerebras": "gpt-oss-120b",
    "dashscope": "qwen3-coder-plus qwen3-coder-flash"}
SMALL = r"flash|mini\b|nano|haiku|lite|small|[-_]air|(?<![\d.])[1-9]b\b|20b"
NO_CHAT = (r"embed|whisper|tts\b|audio|image|dall-e|moderation|rerank|\bocr|guard|realtime|transcri|sora|veo-|babbage|davinci|"
           r"speech|gpt-[\d.]+-pro|codex|deep-research|robotics")
MOST_MODELS = 8


@command("init", "propose a config for the keys and local servers found here",
         arg("--yes", action="store_true", help="take the proposal without asking"),
         arg("--print", dest="is_dry", action="store_true", help="only show it"), WHICH_SERVER[0],
         example="ccr init\nccr init --print")
def init(args):
    path = find_config(os.environ, args.config)
    desk, out = Desk(path, parse_config({}, dict(os.environ))), sys.stderr if args.is_dry else sys.stdout
    if desk.source.fault:
        raise CommandError("%s: %s" % (path, desk.source.fault))
    new, changes = propose(desk, out)
    config, is_good = desk.check(new), is_same(new, desk.raw) and not changes
    print("".join("change: %s\n" % printable(words) for words in changes), end="", file=out, flush=True)
    if is_good:
        print("%s stays as it is" % path, file=out)
    else:
        print(write_json(mask(new, real_secrets(config))), flush=True)
    if args.is_dry:
        return
    if not is_good:
        if not args.yes and not can_ask(config):
            raise CommandError("nothing was written, as nobody can be asked here: `ccr init --yes` writes it to " + path)
        if not args.yes and not says_yes("Write this to %s?" % path, "y"):
            raise CommandError(NO_CHANGE)
        desk.save(new)
    print("next: `ccr check` asks each model, `ccr code` starts Claude Code")


def propose(desk, out) -> tuple:
    """(what is configured, as ccr takes it, and what was found here; in words what that changes and why)."""
    new, changes = imported(desk)
    mode = os.stat(desk.path).st_mode & 0o777 if os.path.exists(desk.path) else 0
    changes += ["the file: mode %04o becomes 0600, as it may hold keys" % mode] if mode & 0o077 else []
    found = look_around(desk, out)
    if not new.get(desk.key):
        return {**new, **proposed([entry for _, entry in found])}, changes
    if not desk.entries:
        return new, changes    # it is no list, as will be said
    names, entries = [str(entry["name"]).strip().lower() for entry in new[desk.key]], list(new[desk.key])
    for title, entry in found:
        entries.append({**entry, "name": entry["name"] + "-2" * (entry["name"] in names)})
        changes.append("%s is added: it was found here, with %s" % (title, ", ".join(map(model_name, entry["models"]))))
    return {**new, desk.key: entries}, changes


def look_around(desk, out) -> list:
    """[(title, entry)] of what answers and is not in Providers: hosts whose key is in the environment, local servers."""
    env, rows, found = desk.state.env, [], []
    known = {origin(str(entry.get("api_base_url"))) for entry in desk.entries if isinstance(entry, dict)}
    for name, title, url, variable in WELL_KNOWN:
        variable = "GOOGLE_API_KEY" if name == "gemini" and not env.get(variable) else variable
        if origin(url) not in known and (not variable or env.get(variable)):
            rows.append((name, title, url, variable))
    print("looking for API keys in the environment, and for local servers ...", file=out, flush=True)
    entries = dict(in_parallel(lambda row: ask_source(env, *row), rows))
    for row in rows:
        _, title, url, variable = row
        entry, words = entries[row]
        if words:
            print("  %s: %s, %s" % (variable or "port %d" % split_host(url)[1], title, words), file=out, flush=True)
        if entry:
            found.append((title, entry))
    if not found:
        print("  found nothing%s" % (" new" if known else "; what follows is an example"), file=out, flush=True)
    return found


def ask_source(env, name, title, url, variable) -> tuple:
    """(its entry in Providers or None, what to tell of it: None for a local server that is not there)."""
    entry = {"name": name, "api_base_url": url, **({"api_key": "$" + variable} if variable else {}), "models": ["any"]}
    try:
        config = parse_config({"Providers": [entry]}, env)
        models = told_models(quiet_state(config, ""), config.providers[0], 8 if variable else 2)
        words = "models: %d" % len(models)
    except ConfigError as e:
        return None, e.problems[0]
    except ApiError as e:
        if e.status in (401, 403) or not variable:
            return None, variable and "which refuses the key: " + e.message
        models = [{"name": name} for name in STARTERS[name].split()]
        words = "which cannot be asked now; some models by guess\n    (%s)" % e.message
    return {**entry, "models": chosen_models(name, models)} if models else None, words


def chosen_models(name, models) -> list:
    """The few of listed_models() to begin with, as Providers has them."""
    first = STARTERS.get(name, "").split()
    ordered = sorted(models, key=lambda model: first.index(model["name"]) if model["name"] in first else len(first))
    return [model if model.get("context") else model["name"] for model in ordered[:MOST_MODELS]]


def model_name(model) -> str:
    """The name of one of a provider's models, which may stand there with its context."""
    return model.get("name") if isinstance(model, dict) else model


def proposed(entries) -> dict:
    """{"Providers", "Router"} of what was found; an example if that is nothing."""
    if not entries:
        name, _, url, variable = WELL_KNOWN[0]
        entries = [{"name": name, "api_base_url": url, "api_key": "$" + variable, "models": STARTERS["ollama"].split()}]
    names = ["%s,%s" % (entries[0]["name"], model_name(model)) for model in entries[0]["models"]]
    small = [name for name in names if re.search(SMALL, name, re.I)]
    default = next((name for name in names if name not in small), names[0])
    background = {"background": small[0]} if small and small[0] != default else {}
    return {"Providers": entries, "Router": {"default": default, **background}}


def imported(desk) -> tuple:
    """(the config as ccr takes it, what was changed and why) of one that was made for claude-code-router."""
    new, changes, kept = dict(desk.raw), [], {}
    for i, entry in enumerate(desk.entries):
        name, at = str(as_dict(entry).get("name") or "").strip().lower(), "%s[%d]" % (desk.key, i)
        if not name or not entry.get("api_base_url"):
            changes.append(at + " is removed: it has no name or api_base_url; claude-code-router skipped it")
            continue
        if name in kept:
            changes.append("%s replaces an earlier %s, as in claude-code-router" % (at, shown(name)))
        kept[name] = entry
    if not desk.entries:
        return new, changes
    new[desk.key] = list(kept.values())
    for section in [section for section in ("Router", "fallback") if isinstance(new.get(section), dict)]:
        routes = {rule: good_targets(value, "%s.%s" % (section, rule), kept, changes) for rule, value in new[section].items()}
        new[section] = {rule: value for rule, value in routes.items() if value is not None}
    return new, changes


def good_targets(value, at, names, changes):
    """The route without the targets whose provider does not exist; None if none is left."""
    items, left = value if isinstance(value, list) else [value], []
    for item in items:
        name, comma, _ = item.partition(",") if isinstance(item, str) else ("", "", "")
        if comma and name.strip().lower() not in names:
            changes.append("%s: %s is removed: there is no such provider; claude-code-router answered 404" % (at, shown(item)))
        else:
            left.append(item)
    if left == items:
        return value
    return left if left[1:] else left[0] if left else None


# --- ui

@command("ui", "open the web page of the server, which is started if need be",
         arg("--no-open", action="store_true", help="only print its address"), *WHICH_SERVER,
         example="ccr ui --no-open")
def ui(args):
    env = dict(os.environ)
    record = find_server(env, args.config, args.port)
    if record is None or record.is_stopping:
        record = launch(find_config(env, args.config), [] if args.port is None else ["--port", str(args.port)], env)[0]
    print(record.url + "/ui/", flush=True)
    if not args.no_open and (sys.platform == "darwin" or {"DISPLAY", "WAYLAND_DISPLAY", "BROWSER"} & set(env)):
        import webbrowser    # only with a screen: without one it would find a text browser, which takes the terminal
        webbrowser.open(record.url + "/ui/")


# --- preset

PRESET_ENV = (r"ANTHROPIC_(DEFAULT_\w+_|SMALL_FAST_)?MODEL\w*|CLAUDE_CODE_(SUBAGENT_MODEL|EFFORT_LEVEL|MAX_\w+|DISABLE_\w+)|"
              r"DISABLE_\w+|CLAUDE_CODE_AUTO_COMPACT_WINDOW|CLAUDE_AUTOCOMPACT_PCT_OVERRIDE|API_TIMEOUT_MS|MAX_\w+_TOKENS|"
              r"ENABLE_TOOL_SEARCH")
PRESET_SETTINGS = ("model", "effortLevel", "alwaysThinkingEnabled", "outputStyle", "language")
ABOUT = ("name version description author homepage repository license keywords ccrVersion source sourceType checksum schema "
         "template configMappings userValues providers provider noServer").split()    # what a manifest holds beside PRESET_KEYS


@command("preset", "share, install and use sets of providers and routes",
         arg("action", metavar="ACTION", help="export NAME, install FILE, DIR or NAME, list, info NAME, delete NAME, use NAME"),
         arg("name", metavar="NAME", nargs="?", help="letters, digits, . _ and -"),
         arg("--set", action="append", default=[], metavar="ID=VALUE", help="install: the answer to one of its questions"),
         arg("--name", dest="as_name", metavar="NAME", help="install: under this name"),
         arg("--output", metavar="FILE", help="export: into this file"), arg("--description", help="export: what it is for"),
         arg("--author", help="export: whose it is"), arg("--tags", metavar="A,B", help="export: its keywords"),
         arg("--include-sensitive", action="store_true", help="export: keys and all"), WHICH_SERVER[0],
         example="ccr preset export work --tags cheap\nccr preset install work.json --set key=...\nccr code --preset work")
def preset(args):
    action = {"rm": "delete", "remove": "delete"}.get(args.action, args.action)
    if action not in PRESET_ACTIONS:
        hint = did_you_mean(action, PRESET_ACTIONS)
        raise CommandError("ccr preset cannot %s%s; it can %s" % (shown(action), hint, ", ".join(PRESET_ACTIONS)))
    if action != "list" and not args.name:
        raise CommandError("ccr preset %s needs the NAME of a preset" % action)
    PRESET_ACTIONS[action](args, Desk(find_config(os.environ, args.config)))


def export_preset(args, desk) -> None:
    place = preset_file(desk.state.env, args.name)
    path = args.output or place
    if os.path.lexists(path):
        raise CommandError("%s is there and stays as it is" % path)
    if not desk.entries:
        raise CommandError("there is nothing to export: no provider is configured")
    about = {"name": args.name, "version": "1.0.0", "description": args.description, "author": args.author,
             "keywords": args.tags and re.split(r"\s*,\s*", args.tags.strip()), "ccrVersion": VERSION}
    raw = {**desk.raw, "Providers": desk.entries}
    if not args.include_sensitive:
        pairs, taken = zip(desk.entries, mask(desk.entries, desk.state.secrets)), []
        raw["Providers"] = [unkeyed(entry, hidden, (entry["name"],), taken) for entry, hidden in pairs]
    kept = {key: raw[key] for key in PRESET_KEYS if key in raw}
    text = write_json({**{key: value for key, value in about.items() if value}, **kept}) + "\n"
    make_folder(os.path.dirname(os.path.abspath(path)))
    save_file(path, text if args.include_sensitive else desk.state.scrub(text))
    names = ", ".join(sorted(set(variables_in(kept))))
    print("saved in %s%s" % (path, ", with its keys: show it to nobody" if args.include_sensitive else
                             names and "; who installs it sets " + names))


def unkeyed(value, hidden, place, taken):
    """A provider's entry with a variable of its own for each thing that is hidden in its masked copy. place: (name, key)."""
    if isinstance(value, dict):
        return {key: unkeyed(item, hidden[key], (place[0], key), taken) for key, item in value.items()}
    if isinstance(value, list):
        return [unkeyed(*pair, place, taken) for pair in zip(value, hidden)]
    is_odd = place[-1] == "api_key" and REFERENCE.match(str(value)) and "API_KEY" not in value
    if value == hidden and not is_odd:    # an odd one is a variable that a preset would not be given
        return value
    words = [word for word in place if word not in ("api_key", "api_base_url")]
    name = re.sub(r"\W+|^(?=\d)", "_", "_".join([*words, "API_KEY"]).upper(), flags=re.A)
    while name in taken:
        name += "_2"
    taken.append(name)
    in_url = re.compile(r"([?&][^=&]*(?:key|token)[^=&]*=)[^&#]+", re.I)
    return in_url.sub(r"\1$" + name, value) if place[-1] == "api_base_url" else "$" + name


def install_preset(args, desk) -> None:
    env, source = desk.state.env, args.name
    if "://" in source:
        raise CommandError("presets are not fetched from the network: download the manifest.json, read it, and install the file")
    path = os.path.join(source, "manifest.json") if os.path.isdir(source) else source
    is_again = not os.path.exists(path) and bool(re.fullmatch(PRESET_NAME, source))
    path = preset_file(env, source) if is_again else path
    manifest = load_manifest(path)
    folder = os.path.basename(os.path.dirname(os.path.abspath(path)))
    name = source if is_again else args.as_name or manifest.get("name") or folder
    target, is_asking = preset_file(env, str(name)), can_ask(desk.state.config)
    if os.path.exists(target) and not is_again and not (is_asking and says_yes("Preset %s is installed. Replace it?" % name)):
        raise CommandError("preset %s is installed and stays as it is; `ccr preset delete %s` removes it" % (name, name))
    answers = preset_answers(manifest, args.set, desk, is_asking)
    manifest = {**manifest, "name": name, "userValues": answers}
    print("\n".join(preset_lines(manifest, preset_config(manifest, desk.state.config, env))))
    if is_asking and not says_yes("Install it?", "y"):
        raise CommandError(NO_CHANGE)
    make_folder(os.path.dirname(target))
    save_file(target, write_json(manifest) + "\n")
    print("installed: `ccr code --preset %s` runs Claude Code with it" % name)


def preset_answers(manifest, pairs, desk, is_asking) -> dict:
    """The answers to a manifest's questions, from --set, the terminal, an earlier time or its defaults; ConfigError."""
    given, answers = dict(pair.partition("=")[::2] for pair in pairs), dict(manifest.get("userValues") or {})
    ids = [field["id"] for field in fields_of(manifest)]
    problems = ["--set %s: the preset asks for %s" % (id, ", ".join(ids) or "nothing") for id in given if id not in ids]
    for field in fields_of(manifest):
        id, options = field["id"], field_options(field, manifest, answers, desk)
        if not holds(field.get("when"), answers):
            continue
        value = given.get(id, answers.get(id, field.get("defaultValue")))
        if is_asking and id not in given:
            value = ask_field(field, options, value)
        answers[id], fault = checked_answer(field, options, value)
        problems += ["%s (%s): %s; give it with --set %s=VALUE" % (id, field.get("label") or id, fault, id)] if fault else []
    if problems:
        raise ConfigError(problems)
    return answers


def fields_of(manifest) -> list:
    return [field for field in manifest.get("schema") or () if field.get("id") and isinstance(field["id"], str)]


def field_options(field, manifest, answers, desk) -> list:
    """The choices of a select or multiselect."""
    options = field.get("options")
    if isinstance(options, dict):
        entries = [*desk.entries, *(manifest.get("Providers") or ())]
        models = {str(entry.get("name")): entry.get("models") for entry in entries}
        provider = str(filled(options.get("providerField"), answers))
        made = {"providers": list(models), "models": models.get(provider)}
        options = made.get(str(options.get("type")), options.get("options"))
    items = [item if isinstance(item, dict) and "value" in item else {"value": model_name(item)}
             for item in (options if isinstance(options, list) else ())]
    return [Option(str(item.get("label") or item["value"]), str(item.get("description") or ""), item["value"])
            for item in items if not item.get("disabled")]


def ask_field(field, options, default):
    question, kind = str(field.get("prompt") or field.get("label") or field["id"]), field.get("type", "password")
    if options and kind == "select":
        return choose(question, sorted(options, key=lambda option: option.value != default))
    labels, default = ", ".join(option.label for option in options), "ny"[default] if type(default) is bool else default
    words = {"confirm": " (y/n)", "multiselect": " (some of %s, with commas)" % labels, "password": ", not shown"}
    text = ",".join(map(str, default if isinstance(default, list) else [] if default is None else [default]))
    return ask_line(question + words.get(kind, ""), text, lambda text: checked_answer(field, options, text)[1],
                    kind == "password")


def checked_answer(field, options, value) -> tuple:
    """(the answer in its type, what is wrong with it or None)."""
    kind, texts = field.get("type", "password"), {str(option.value): option.value for option in options}
    if value in (None, "", []):
        return value, "is missing" if field.get("required", True) else None
    if kind == "number":
        if not re.fullmatch(r"-?\d{1,15}(\.\d+)?", str(value)):
            return value, "is no number"
        value = float(value) if "." in str(value) else int(value)
        limits = [{"field": "it", "operator": operator, "value": field[key]}
                  for key, operator in (("min", "gte"), ("max", "lte")) if field.get(key) is not None]
        if not holds(limits, {"it": value}):
            return value, "is not from %s to %s" % (field.get("min", "-"), field.get("max", "-"))
    elif kind == "confirm":
        value = str(value).lower() in ("y", "yes", "true", "1")
    elif kind in ("select", "multiselect") and texts:
        items = value if isinstance(value, list) else str(value).split(",") if kind == "multiselect" else [value]
        chosen = [texts.get(str(item).strip()) for item in items]
        if None in chosen:
            return value, "is none of " + ", ".join(texts)
        value = chosen if kind == "multiselect" else chosen[0]
    try:
        is_good = not field.get("validator") or re.search(str(field["validator"]), str(value))
    except re.error:
        is_good = True    # JavaScript's own
    return value, None if is_good else "does not look right (%s)" % field["validator"]


def preset_lines(manifest, config) -> list:
    """What a preset would do: where it sends requests, with which key, and what of it is left out."""
    def key_words(key):
        return "none" if not key else key if isinstance(key, str) and REFERENCE.match(key) else "as given"
    rows = [("PROVIDER", "KEY", "ADDRESS")]
    rows += [tuple(map(printable, (each.name, key_words(each.raw.get("api_key")), each.url))) for each in config.providers]
    routes = [(rule, printable(", then ".join(targets))) for rule, targets in config.router.items() if rule in ROUTES]
    used = setting_names(preset_settings(manifest))
    left = [key for key in manifest if key not in (*ABOUT, *PRESET_KEYS, "claudeCodeSettings")]
    asked = setting_names(manifest.get("claudeCodeSettings") or {})
    left += ["claudeCodeSettings." + key for key in asked if key not in used]
    words = "left out, as a preset brings nothing that runs, listens or logs: " + ", ".join(map(printable, left))
    return [*table(rows), "", *table([("ROUTE", "MODEL"), *routes]), *([words] if left else []),
            *("warning: " + printable(words) for words in config.warnings if words.startswith("Providers"))]


def list_presets(args, desk) -> None:
    rows = []
    for name in preset_names(desk):
        try:
            manifest = load_manifest(preset_file(desk.state.env, name))
            rows.append((name, printable(manifest.get("version") or "-"), printable(manifest.get("description") or "")))
        except ConfigError as e:
            rows.append((name, "-", "; ".join(e.problems)))
    lines = table([("PRESET", "VERSION", "DESCRIPTION"), *rows]) if rows else ["no preset is installed (ccr preset install FILE)"]
    print("\n".join(lines))


def preset_names(desk) -> list:
    folder = os.path.dirname(os.path.dirname(preset_file(desk.state.env, "x")))
    return sorted(name for name in folders_in(folder) if re.fullmatch(PRESET_NAME, name))


def installed(args, desk) -> dict:
    path = preset_file(desk.state.env, args.name)
    if not os.path.isfile(path):
        raise CommandError("no preset is called %s%s" % (shown(args.name), did_you_mean(args.name, preset_names(desk))))
    return load_manifest(path)


def show_preset(args, desk) -> None:
    manifest = installed(args, desk)
    config = preset_config(manifest, desk.state.config, desk.state.env)
    about = [("%s:" % key, printable(manifest[key])) for key in ABOUT[:8] if isinstance(manifest.get(key), str)]
    print("\n".join([*columns(about), "", *preset_lines(manifest, config)]))


def delete_preset(args, desk) -> None:
    path = preset_file(desk.state.env, args.name)
    if not os.path.lexists(path):
        installed(args, desk)    # says so
    os.unlink(path)
    try:
        os.rmdir(os.path.dirname(path))
    except OSError:
        pass    # something else is in it: that stays
    print("preset %s is deleted" % args.name)


def use_preset(args, desk) -> None:
    """The preset's providers and routes become those of the config file; other providers stay."""
    manifest = installed(args, desk)
    config = preset_config(manifest, desk.state.config, desk.state.env)
    own = {key: config.raw[key] for key in preset_values(manifest)}
    entries = {str(entry["name"]).strip().lower(): entry for entry in desk.entries}
    for provider in config.providers if own.pop("Providers", ()) else ():
        name, mine = provider.name.lower(), desk.state.config.provider(provider.name)
        if mine and origin(mine.url) != origin(provider.url):
            raise CommandError("your own provider %s is at another address, %s: rename it" % (shown(mine.name), mine.url))
        entries[name] = {**entries.get(name, {}), **provider.raw}
    desk.save({**desk.raw, **own, desk.key: list(entries.values())})


def preset_settings(manifest) -> dict:
    """What of a preset's claudeCodeSettings goes to claude: models and limits; nothing that is run or that permits."""
    settings = manifest.get("claudeCodeSettings") or {}
    env = {name: str(value) for name, value in as_dict(settings.get("env")).items() if re.fullmatch(PRESET_ENV, name)}
    return {**{key: settings[key] for key in PRESET_SETTINGS if key in settings}, **({"env": env} if env else {})}


def setting_names(settings) -> list:
    return [key for key in settings if key != "env"] + ["env." + name for name in as_dict(settings.get("env"))]


PRESET_ACTIONS = {"export": export_preset, "install": install_preset, "list": list_presets, "info": show_preset,
                  "delete": delete_preset, "use": use_preset}


# --- statusline, usage

MODULES = {    # type of a module -> its text, if it has none of its own
    "workDir": "{{workDirName}}", "gitBranch": "{{gitBranch}}", "model": "{{model}}", "route": "({{route}})",
    "context": "{{contextPercent}}% context", "usage": "{{totalInputTokens}} in {{totalOutputTokens}} out",
    "speed": "{{tokenSpeed}} tok/s", "cost": "{{cost}}", "duration": "{{duration}}", "lines": "+{{linesAdded}} -{{linesRemoved}}"}
SHOWN = ("workDir", "gitBranch", "model", "route", "context", "usage", "speed", "cost")    # by the built-in themes
THEMES = {    # colours, or colours on backgrounds, of what is SHOWN
    "default": "bright_blue magenta bright_cyan cyan yellow gray gray green".split(),
    "simple": [""] * len(SHOWN),
    "powerline": "white/blue white/magenta black/cyan black/cyan black/yellow white/gray white/gray black/green".split()}
ARROW = "\ue0b0"
TAIL_BYTES = 256 << 10
NAME_IN_TEXT = Pattern(r"\{\{\s*(\w+)\s*\}\}")


@command("statusline", "print the status line of a session (JSON on standard input)",
         arg("preset", metavar="PRESET", nargs="?", default=None, help="the preset the session runs with"), WHICH_SERVER[0],
         example="echo '{\"session_id\": \"...\", \"cwd\": \"/src\"}' | ccr statusline")
def statusline(args):
    env = os.environ
    try:
        status = json.loads(sys.stdin.buffer.read())
    except ValueError as e:
        raise CommandError("statusline needs Claude Code's status as JSON on standard input: %s" % e) from None
    try:
        config = load_config(find_config(env, args.config), env)
        config = preset_config(load_manifest(preset_file(env, args.preset)), config, env) if args.preset else config
    except (ConfigError, ApiError):
        config = Config()    # `ccr check` tells; the line goes on
    print(status_line(status_facts(as_dict(status), config, env), config.status_line, env), flush=True)
    if __name__ == "__main__":
        os._exit(0)    # Python would tidy up for as long as all this took


def status_line(facts, style, env) -> str:
    """The line in the chosen style: those modules that have something to say."""
    name = str(style.get("currentStyle") or "default")
    is_plain = bool(env.get("NO_COLOR")) or env.get("TERM") in ("dumb", "unknown") or env.get("USE_SIMPLE_ICONS") == "true"
    modules = as_dict(style.get(name)).get("modules")
    if not modules:
        colours = zip(SHOWN, THEMES.get(name, THEMES["default"]))
        modules = [dict(zip(("type", "color", "background"), [kind, *each.split("/")])) for kind, each in colours]
    texts = [(module_text(module, facts, is_plain), module) for module in modules]
    parts = [(text, module.get("color"), module.get("background")) for text, module in texts if text]
    if is_plain:
        return " | ".join(text for text, _, _ in parts)
    if name != "powerline":
        return "  ".join(coloured(text, colour(ink), colour(ground, 48)) for text, ink, ground in parts)
    grounds = [ground or "blue" for _, _, ground in parts] + [None]
    return "".join(coloured(" %s " % text, colour(ink or "white"), colour(ground, 48)) +
                   coloured(ARROW, colour(ground), colour(following, 48))
                   for (text, ink, _), ground, following in zip(parts, grounds, grounds[1:]))


def module_text(module, facts, is_plain) -> str:
    """A module's icon and text; '' if none of the variables in it has a value."""
    text = str(module.get("text") or MODULES.get(str(module.get("type")), ""))
    names = NAME_IN_TEXT.findall(text)
    if not text or names and not any(facts.get(name) for name in names):
        return ""
    text = NAME_IN_TEXT.sub(lambda match: str(facts.get(match[1]) or ""), text)
    icon = "" if is_plain else str(module.get("icon") or "")
    return printable(icon + " " + text if icon else text)


def colour(name, base=38) -> str:
    """The terminal's code for a colour by name or #hex, as foreground (38) or background (48); '' for none."""
    name = str(name or "").lower().replace("bg_", "")
    digits = "".join(digit * 2 for digit in name[1:]) if len(name) == 4 else name[1:]
    if name.startswith("#") and re.fullmatch("[0-9a-f]{6}", digits):
        return "%d;2;%d;%d;%d" % (base, *bytes.fromhex(digits))
    code = STYLES.get(name)
    return str(int(code) + base - 38) if code else ""


def coloured(text, *codes) -> str:
    codes = ";".join(filter(None, codes))
    return "\x1b[%sm%s\x1b[0m" % (codes, text) if codes else text


def status_facts(status, config, env) -> dict:
    """The variables of the modules: what Claude Code says of the session, and what ccr knows better: who answered, and why."""
    facts = dict(status)
    for key in ("workspace", "context_window", "current_usage", "cost", "model"):
        facts.update(as_dict(facts.get(key)))    # their members have different names

    def number(key):
        value = facts.get(key)
        return value if isinstance(value, (int, float)) and abs(value) < 1e15 else 0
    session, folder = str(facts.get("session_id") or ""), str(facts.get("current_dir") or facts.get("cwd") or "")
    last, price = last_turn(env, session, config.prices) if session else ({}, None)
    used = sum(map(number, ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")))
    used, said = used or last.get("input_tokens") or 0, last.get("output_tokens") or number("output_tokens")
    names = [str(facts.get("id")), *config.router.get("default", ())]    # before the first turn: who is going to answer
    names = ["%s,%s" % (last["provider"], last["model"])] if last else names
    provider, model = next(filter(None, map(config.target, names)), (None, None))
    size = provider and (provider.model(model).context or provider.context) or number("context_window_size")
    added, removed = number("total_lines_added"), number("total_lines_removed")
    speed, first = speed_of(last) if last else None, last.get("first_ms")
    lines = {"linesAdded": str(added), "linesRemoved": str(removed), "netLines": str(added - removed)}
    return {
        "workDirName": os.path.basename(folder.rstrip("/")) or folder, "gitBranch": git_branch(folder),
        "model": last.get("model") or model or facts.get("display_name") or facts.get("id"),
        "provider": last.get("provider"), "route": last.get("rule"), "contextWindowSize": short(size),
        "contextPercent": str(round(100 * used / size)) if used and size else "",
        "inputTokens": short(last.get("input_tokens") or used), "outputTokens": short(said),
        "totalInputTokens": short(number("total_input_tokens") or used),
        "totalOutputTokens": short(number("total_output_tokens") or said),
        "tokenSpeed": str(round(speed)) if speed else "", "timeToFirstToken": "%.1fs" % (first / 1000) if first else "",
        "cost": money(price), "duration": duration(number("total_duration_ms") // 1000),
        **(lines if added or removed else {}), "version": facts.get("version"), "sessionId": session[:8]}


def last_turn(env, session, prices) -> tuple:
    """(the record of the session's last turn that was no side call, or {}; what its turns cost or None), from the logs."""
    needle, last, price = b'"session":' + json.dumps(session).encode(), {}, None
    for path in reversed(log_paths(env)):
        lines = lines_with(path, needle, not prices)
        for record in filter(None, map(turn_of, reversed(lines))):
            if not last and record.get("model") and record.get("rule") != "background":
                last = record
            amount = cost_of(record, prices.get("%s,%s" % (record.get("provider"), record.get("model"))))
            price = price if amount is None else (price or 0) + amount
            if last and not prices:
                return last, None
        if last and not lines:
            break    # the session began later
    return last, price


def lines_with(path, needle, is_tail) -> list:
    """The lines of a file that hold these bytes; of its last part only, if is_tail."""
    try:
        with open(path, "rb") as f:
            f.seek(max(0, os.fstat(f.fileno()).st_size - TAIL_BYTES) if is_tail else 0)
            data = f.read()
    except OSError:
        return []    # rotated away meanwhile
    lines, at = [], data.find(needle)
    while at >= 0:    # quicker than to look into each line
        start, end = data.rfind(b"\n", 0, at) + 1, data.find(b"\n", at)
        lines.append(data[start:end])
        at = data.find(needle, end) if end >= 0 else -1
    return lines


def git_branch(folder) -> str:
    """The branch that is checked out there, or the first digits of the commit; without asking git."""
    while True:
        place = os.path.join(folder, ".git")
        try:
            if os.path.isfile(place):    # a worktree or submodule
                place = os.path.join(folder, read_text(place).partition("gitdir:")[2].strip())
            head = read_text(os.path.join(place, "HEAD")).strip()
            return head[16:] if head.startswith("ref: refs/heads/") else head[:7]
        except (OSError, ValueError):
            if os.path.dirname(folder) == folder:
                return ""
            folder = os.path.dirname(folder)


def short(count) -> str:
    """950, 12.3k, 4.5M; '' for nothing."""
    count = count if isinstance(count, (int, float)) else 0
    return "%.1fM" % (count / 1e6) if count >= 1e6 else "%.1fk" % (count / 1e3) if count >= 1000 else str(count or "")


def money(amount) -> str:
    return "" if amount is None else "$%.2f" % amount if amount >= 0.01 or not amount else "%.2fc" % (amount * 100)


@command("usage", "tell turns, tokens, cost and speed by day and model",
         arg("--days", type=int, default=7, help="how many days back, today included (7)"),
         arg("--json", action="store_true", help="for programs"), WHICH_SERVER[0], example="ccr usage --days 30")
def usage(args):
    try:
        prices = load_config(find_config(os.environ, args.config), os.environ).prices
    except ConfigError:
        prices = {}
    if not 0 < args.days < 10000:
        raise CommandError("--days: expected 1 to 9999")
    year, month, day = time.localtime()[:3]
    first = time.strftime("%Y-%m-%d", time.localtime(time.mktime((year, month, day - args.days + 1, 12, 0, 0, 0, 0, -1))))
    groups, days = {}, {}
    for path in log_paths(os.environ):
        for record in filter(None, map(turn_of, lines_with(path, b'"request_id":', False))):
            name = "%s,%s" % (record.get("provider"), record.get("model")) if record.get("model") else "(refused)"
            minute = record["time"][:16]
            if minute not in days:
                days[minute] = local_time(record["time"])[:10]    # which is slow
            day = days[minute]
            if day >= first:
                groups.setdefault((day, name), []).append(record)
    ordered = sorted(groups, key=lambda group: (group[0], -len(groups[group]), group[1]))
    rows = [used_by(*group, groups[group], prices.get(group[1])) for group in ordered]
    total = used_by("", "total", [record for group in ordered for record in groups[group]], None)
    costs = [row["cost"] for row in rows if row["cost"] is not None]
    total["cost"] = sum(costs) if costs else None
    if args.json:
        print(json.dumps({"days": args.days, "rows": rows, "total": total}, indent=2))
    else:
        print("\n".join(usage_lines(rows, total)) if rows else "the logs tell of no turn in the last %d days" % args.days)


def used_by(day, name, records, price) -> dict:
    """What these turns add up to."""
    sums = {field: sum(record.get(field) or 0 for record in records) for field in TOKEN_FIELDS}
    return {"day": day, "model": name, "turns": len(records), **sums, "cost": cost_of(sums, price),
            "errors": sum(bool(record.get("error")) for record in records),
            "fallbacks": sum(bool(record.get("fallbacks")) for record in records),
            "first_ms": middle(record.get("first_ms") for record in records), "tokens_per_s": middle(map(speed_of, records))}


USAGE_COLUMNS = {    # title -> its text; "" for nothing
    "turns": lambda row: str(row["turns"]), "in": lambda row: short(row["input_tokens"]),
    "cached": lambda row: short(row["cached_tokens"]), "out": lambda row: short(row["output_tokens"]),
    "first": lambda row: "%.2f s" % (row["first_ms"] / 1000) if row["first_ms"] else "",
    "tok/s": lambda row: "%.0f" % row["tokens_per_s"] if row["tokens_per_s"] else "",
    "errors": lambda row: short(row["errors"]), "fell back": lambda row: short(row["fallbacks"]),
    "cost": lambda row: money(row["cost"])}


def usage_lines(rows, total) -> list:
    """A table by day, with bars for the turns; a column that would be empty is left out."""
    kept = {title: text for title, text in USAGE_COLUMNS.items() if any(map(text, rows))}
    mark = "\u2588" if "utf" in (sys.stdout.encoding or "").lower() else "#"
    lines, day, most = [["", "", *kept]], "", max(row["turns"] for row in rows)
    for row in [*rows, total]:
        if row["day"] not in (day, ""):
            day = row["day"]
            lines.append([paint(day, "bold"), *[""] * (1 + len(kept))])
        bar = mark * max(1, round(8 * row["turns"] / most)) if row["day"] else ""
        name = "  " + printable(row["model"]) if row["day"] else "total"
        lines.append([name, bar, *(text(row) for text in kept.values())])
    return table(lines, right=range(2, 11), elastic=(0,))


# === 14. Page =======================================================================

# The server puts a nonce and its token in place of the @@ marks. What is shown is built of text nodes, never of markup.
PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="ccr-token" content="@@TOKEN@@">
<link rel="icon" href="data:,">
<title>ccr</title>
<style nonce="@@NONCE@@">
:root{color-scheme:light dark;--bg:#f7f7f5;--card:#fff;--ink:#1c1d20;--dim:#63656b;--line:#e1e1dd;--soft:#f1f1ee;--accent:#1f5fbf;--on:#fff;
  --good:#17784a;--warn:#8a5a00;--bad:#b3261e;--badbg:#fdf0ee}
@media (prefers-color-scheme:dark){:root{--bg:#131416;--card:#1b1c1f;--ink:#e9e9eb;--dim:#a0a2a9;--line:#303136;
  --soft:#25262a;--accent:#7fb0ff;--on:#10131a;--good:#5cc492;--warn:#e0b45a;--bad:#ff8f85;--badbg:#331d1c}}
*{box-sizing:border-box;margin:0}
html{scrollbar-gutter:stable;scroll-padding-top:90px}
body{background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.15rem} h2{font-size:1.05rem} h3{font-size:.95rem} h1,h2,h3{line-height:1.5;font-weight:650}
code,pre,.mono{font:.87em/1.6 ui-monospace,Consolas,monospace}
code{background:var(--soft);padding:.1em .4em;border-radius:4px}
[hidden]{display:none !important}
.dim,.hint,th,dt{color:var(--dim)} .good{color:var(--good)} .warn{color:var(--warn)} .bad,.fault{color:var(--bad)}
.small,.hint,.fault,th{font-size:.87rem}
.num{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.cut{overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px;border-radius:4px}
header,main,#bar > div{max-width:1200px;margin:0 auto;padding:0 20px}
#top{background:var(--card);border-bottom:1px solid var(--line);position:sticky;top:0;z-index:3}
#brand{display:flex;align-items:baseline;gap:12px;padding-top:10px} #place{flex:1;min-width:0}
#live{white-space:nowrap} #live::before{content:"\25CF\00A0"}
[role=tablist]{display:flex;gap:4px;margin:0 -10px}
[role=tab]{border:0;border-bottom:2px solid transparent;background:none;border-radius:0;padding:7px 10px;color:var(--dim)}
[role=tab]:hover,button.link:hover{background:none;color:var(--ink)}
[role=tab][aria-selected=true]{color:var(--ink);border-color:var(--accent);text-shadow:.4px 0 currentColor}
.badge{background:var(--bad);color:var(--card);border-radius:9px;padding:0 6px;font-size:.75rem;margin-left:5px}
main{padding-top:20px;padding-bottom:110px} #view:focus{outline:0}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px 18px;margin-bottom:16px}
.alert{border-color:var(--bad);background:var(--badbg)} .note{background:var(--soft)}
.stack > * + *{margin-top:12px}
.row{display:flex;gap:8px;align-items:center;flex-wrap:wrap} .line{flex-wrap:nowrap}
  .grow,.line > input,.line > select{flex:1;min-width:0}
.grid{display:grid;grid-template-columns:1fr 1fr;gap:14px 20px;align-items:start} .grid > *{min-width:0}
.grid > .checked{align-self:center}
button,input,select,textarea{font:inherit;color:inherit;border:1px solid var(--line);border-radius:7px;min-height:34px}
button{background:var(--card);padding:4px 12px;cursor:pointer;white-space:nowrap}
button:hover{background:var(--soft)} button:disabled{opacity:.45;cursor:default}
button.main{background:var(--accent);border-color:var(--accent);color:var(--on);font-weight:600}
button.icon{padding:0;width:34px;color:var(--dim);flex:none}
button.link{border:0;padding:0;min-height:0;background:none;color:var(--accent);text-align:left;white-space:normal}
input,select,textarea{width:100%;min-width:0;padding:4px 9px;background:var(--bg)}
::placeholder{color:var(--dim);opacity:.75} select,input{text-overflow:ellipsis}
[type=checkbox]{width:17px;height:17px;min-height:0;accent-color:var(--accent);flex:none}
[aria-invalid=true]{border-color:var(--bad)}
label{display:block;font-weight:550;font-size:.9rem;margin-bottom:3px}
label.check{display:flex;gap:8px;align-items:center;margin-bottom:0;font:inherit}
.hint,.fault{margin-top:3px} .fault::before{content:"\26A0\FE0E  "}
.chip{display:inline-block;border:1px solid var(--line);border-radius:99px;padding:0 9px}
.chip{font-size:.82rem;font-weight:400;max-width:100%}
.tiles{display:grid;grid-template-columns:repeat(6, 1fr);gap:12px;margin-bottom:16px}
.tile{padding:12px 14px;margin:0;min-height:97px;min-width:0} .tile *{display:block}
.tile b{font-size:1.4rem;line-height:1.35;font-weight:600}
.plots{display:grid;grid-template-columns:1fr 1fr;gap:0 16px} .plots > *{min-width:0}
.plot{position:relative;height:160px;margin-top:10px} .plot svg{display:block} .plot line{stroke:var(--line)}
.plot text{fill:var(--dim);font-size:11px} .plot .at{fill:var(--ink);opacity:.08}
.tip{position:absolute;top:0;z-index:2;pointer-events:none;background:var(--card);border:1px solid var(--line);border-radius:7px;
  padding:5px 9px;font-size:.82rem;box-shadow:0 3px 12px #0004;max-width:250px}
.legend{display:flex;flex-wrap:wrap;gap:0 14px;font-size:.82rem;min-height:1.5em} .key::before{content:"\25A0\00A0"}
.key > span{color:var(--ink)} .c0{color:#4a80d4} .c1{color:#d58a3c} .c2{color:#3a9f80}
  .c3{color:#b06aa9} .c4{color:#9c903a} .c5{color:#8b8d94}
rect{fill:currentColor} .meter{display:block;width:100%;height:6px;margin-top:4px} .track{color:var(--soft)}
table{border-collapse:collapse;width:100%;font-size:.9rem} th{text-align:left;font-weight:550;white-space:nowrap}
  th.num{text-align:right}
th,td{padding:6px 12px 6px 0;vertical-align:top} th:last-child,td:last-child{padding-right:0} td{border-top:1px solid var(--line)}
td > span{display:block} td > .chip,td > .key{display:inline-block}
#turns{table-layout:fixed} #turns tr{cursor:pointer} #turns tbody tr:hover{background:var(--soft)}
.w5{width:4.6rem} .w6{width:5.8rem} .w7{width:7.2rem} .w8{width:8rem} .w10{width:10rem}
.models,.prices{display:grid;grid-template-columns:minmax(0,
  1fr) 8rem 8rem 8rem auto;gap:6px 8px;align-items:start;margin-top:8px}
.rule{display:grid;grid-template-columns:12rem minmax(0, 1fr);gap:6px 20px;padding:14px 0;border-top:1px solid var(--line)}
.use{border-left:3px solid var(--line);padding-left:14px}
.cols{display:grid;grid-template-columns:minmax(0, 1fr) 21rem;gap:0 16px;align-items:start} .cols > form{position:sticky;top:95px}
.editor{display:flex;border:1px solid var(--line);border-radius:7px;overflow:hidden;background:var(--bg);height:max(340px,calc(100vh - 330px))}
.editor pre{padding:8px 8px 60px;text-align:right;color:var(--dim);overflow:hidden;min-width:3rem;flex:none}
.editor textarea{border:0;border-left:1px solid var(--line);border-radius:0;resize:none;padding:8px;white-space:pre}
#bar{position:fixed;inset:auto 0 0;background:var(--card);border-top:1px solid var(--line);z-index:4}
  #bar > div{padding-top:10px;padding-bottom:10px}
#toast{position:fixed;inset:auto 14px 76px;margin:auto;background:var(--ink);color:var(--bg);padding:9px 16px;border-radius:9px;
  z-index:6;width:fit-content;max-width:560px}
#toast button{background:none;border:0;color:inherit;text-decoration:underline;min-height:0;padding:0 0 0 12px}
dialog{margin:auto;border:1px solid var(--line);border-radius:12px;background:var(--card);color:inherit;padding:20px 22px;
  width:min(600px,calc(100vw - 24px));max-height:calc(100dvh - 32px);overflow:auto}
dialog::backdrop{background:#0008} dialog form > .row{justify-content:flex-end}
dl{display:grid;grid-template-columns:fit-content(40%) minmax(0, 1fr);gap:5px 18px;font-size:.92rem} dd{white-space:pre-line}
.list{max-height:46vh;overflow:auto;border:1px solid var(--line);border-radius:7px;padding:6px 10px} .list label{padding:4px 0}
@media (max-width:1000px){.cols{grid-template-columns:minmax(0, 1fr)} .cols > form{position:static}
  .tiles{grid-template-columns:repeat(3, 1fr)}}
@media (max-width:760px){
  header,main,#bar > div{padding-left:14px;padding-right:14px} .card{padding:14px}
    .grid,.plots,.rule{grid-template-columns:minmax(0, 1fr)}
  .tiles{grid-template-columns:1fr 1fr;gap:10px} [role=tablist]{gap:0;justify-content:space-between} [role=tab]{padding:7px 9px}
  .models,.prices{grid-template-columns:1fr 1fr 1.4fr auto} .th{display:none} .name{grid-column:1 / -1;margin-top:6px}
  thead,.meter,td:empty{display:none} table,tbody{display:block}
    tr{display:flex;flex-wrap:wrap;gap:0 12px;padding:9px 0;border-top:1px solid var(--line)}
  tbody tr:first-child{border-top:0} td{border:0;padding:0} td.num{text-align:left}
    td.full{flex:1 0 100%} td.push{margin-left:auto}
  td[data-label]::before{content:attr(data-label) " ";color:var(--dim);font-size:.82rem}
  .wrap{flex-wrap:wrap;justify-content:flex-end} .wrap > :first-child{flex:1 0 100%}
  input,select,textarea{font-size:16px}
}
</style>
</head>
<body spellcheck="false">
<div id="top"><header>
<div id="brand"><h1>ccr</h1><p id="place" class="dim small cut"></p><span id="live" class="small dim">connecting</span></div>
<div role="tablist" aria-label="Views"></div>
</header></div>
<main><div id="alert"></div><div id="view" role="tabpanel" tabindex="-1"></div></main>
<div id="bar" hidden><div class="row line">
<p class="grow">Unsaved changes</p><button id="discard">Discard</button><button id="save" class="main">Save</button></div></div>
<div id="toast" role="status" hidden></div>
<dialog id="dialog" aria-labelledby="dialogTitle"></dialog>
<datalist id="allModels"></datalist>
<script nonce="@@NONCE@@">
"use strict";
// --- small tools
const $ = id => document.getElementById(id);
const isObject = value => value !== null && typeof value === "object" && !Array.isArray(value);
const isSame = (a, b) => JSON.stringify(a) === JSON.stringify(b);
const list = value => value == null || value === false ? [] : Array.isArray(value) ? value : [value];
const flat = value => value == null ? "" : typeof value === "object" ? JSON.stringify(value) : String(value);
const SVG = "http://www.w3.org/2000/svg", NAMES = {path: "data-path", label: "aria-label"};

// h("p.dim", {onclick: f}, "text", child): an element; strings only ever become text nodes
function h(spec, props, ...kids) {
  const [tag, ...classes] = spec.split("."), isProps = props?.constructor === Object;
  const e = /^(svg|rect|line|text)$/.test(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag || "div");
  if (classes.length) e.setAttribute("class", classes.join(" "));
  for (const [key, value] of Object.entries({autocomplete: tag === "input" && "off", ...(isProps && props)})) {
    if (value == null || value === false) continue;
    if (key.startsWith("on")) e.addEventListener(key.slice(2), value);
    else if (key === "value" || key === "checked") e[key] = value;
    else e.setAttribute(NAMES[key] || key, value === true ? "" : value);
  }
  e.append(...[isProps ? [] : props, kids].flat(9).filter(kid => kid != null && kid !== false && kid !== ""));
  return e;
}
const button = (text, onclick, {style = "", ...props} = {}) => h("button" + style, {type: "button", onclick, ...props}, text);
// the buttons to move one of several up and down, and to remove it
function arrows(items, n, what, done) {
  const icon = (sign, label, disabled, change) =>
    button(sign, () => { change(); done(); }, {style: ".icon", label, title: label, disabled});
  const move = by => () => items.splice(n + by, 0, ...items.splice(n, 1));
  return [icon("\u2191", "Move " + what + " up", !n, move(-1)),
    icon("\u2193", "Move " + what + " down", n > items.length - 2, move(1)),
    icon("\u00d7", "Remove " + what, false, () => items.splice(n, 1))];
}
const count = n => n == null ? "" : Math.round(n).toLocaleString("en");
const three = n => Number(n.toPrecision(3));
const short = n => n < 1e4 ? count(n) : n < 1e6 ? three(n / 1e3) + " k" : three(n / 1e6) + " M";
const seconds = ms => ms < 6e4 ? (ms / 1e3).toFixed(1) + " s" : (ms / 6e4).toFixed(1) + " min";
const span = ms => ms == null ? "" : ms < 1e3 ? Math.round(ms) + " ms" : seconds(ms);
const rate = n => n ? n < 10 ? n.toFixed(1) : count(n) : "";
const money = n => n == null ? "" : "$" + n.toFixed(n && n < 1 ? 4 : 2);
const hours = {hour: "2-digit", minute: "2-digit", hourCycle: "h23"};
const clock = (time, second) => new Date(time).toLocaleTimeString("en", {...hours, second});

// --- talking to ccr
let token = document.querySelector("meta[name=ccr-token]").content, apikey = sessionStorage.getItem("ccr-key"), keyAsked = null;
const auth = () => apikey ? {authorization: "Bearer " + apikey} : {};

async function call(method, path, body, isRetry) {
  let reply;
  try {
    reply = await fetch(path, {method, cache: "no-store", body: body && JSON.stringify(body),
      headers: {...auth(), accept: "application/json", "x-ccr-token": token, ...(body && {"content-type": "application/json"})}});
  } catch { throw {message: "ccr does not answer. Is it running? Try: ccr status"}; }
  if (reply.status === 401) { await askKey(); return call(method, path, body); }
  if (reply.status === 403 && !isRetry) {          // ccr was restarted: its token is a new one
    token = /ccr-token" content="(\w*)/.exec(await (await fetch("/ui/")).text())[1];
    return call(method, path, body, true);
  }
  const data = await reply.json().catch(() => ({}));
  if (!reply.ok) throw {status: reply.status, message: data.error?.message || "ccr answered " + reply.status,
    problems: data.error?.details};
  return data;
}
const faultsOf = error => error.problems?.length ? error.problems : [{path: "", message: error.message}];
const wordsOf = error => faultsOf(error).map(p => (p.path && p.path.replace("Providers[0].", "") + ": ") + p.message).join("; ");

function askKey() {
  return keyAsked ||= (async () => {
    const input = h("input", {id: "key", type: "password"});
    const wrong = apikey && h("p.fault", {role: "alert"}, "That is not the key.");
    const body = [h("p", "It is the APIKEY of its config.json, and stays in this browser tab."),
      h("div", h("label", {for: "key"}, "APIKEY"), input, wrong)];
    while (!await ask("This ccr asks for its key", body, [["Continue", true]]));
    apikey = /^[!-~]+$/.test(input.value.trim()) ? input.value.trim() : "-";
    sessionStorage.setItem("ccr-key", apikey);
    keyAsked = null;
  })();
}
// The one dialog; resolves to the value of the button pressed, undefined after Esc. Enter presses the first.
function ask(title, body, buttons) {
  return new Promise(done => {
    let answer;
    const press = value => { answer = value; $("dialog").close(); };
    const others = buttons.slice(1).reverse().map(([text, value]) => button(text, () => press(value)));
    const form = h("form.stack", {onsubmit: event => { event.preventDefault(); press(buttons[0][1]); }},
      h("h2", {id: "dialogTitle"}, title), body, h(".row", others, h("button.main", buttons[0][0])));
    $("dialog").replaceChildren(form);
    $("dialog").onclose = () => done(answer);
    if (!$("dialog").open) $("dialog").showModal();
    form.querySelector("input, .main").focus();
  });
}
let toastTimer;
function toast(text, undo) {
  const hide = () => { $("toast").hidden = true; };
  $("toast").replaceChildren(text, undo ? button("Undo", () => { hide(); undo(); }) : "");
  $("toast").hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(hide, 7000);
}

// --- the config: `served` is what ccr has; `draft`, or in the JSON view `text`, is what is being edited
let served = null, draft = {}, text = null, problems = [], transformers = [], tab = "now";
const opened = new Set();           // names of the providers whose form is open
const providersKey = () => list(draft.providers).length && !list(draft.Providers).length ? "providers" : "Providers";
const providers = () => list(draft[providersKey()]).map(p => isObject(p) ? p : {});
const modelName = model => isObject(model) ? model.name : model;
const allModels = () => providers().flatMap(p => list(p.models).map(m => p.name + "," + modelName(m)));
const isDirty = () => served && (!isSame(draft, served.config) || (text !== null && text !== served.text));

// Values are named by their path, as in the faults that ccr tells: "Providers[0].name"
const steps = path => path.split(/[.[\]]+/).filter(Boolean);
const get = path => steps(path).reduce((object, key) => object?.[key], draft);
function set(path, value) {         // an empty value is no key at all: the file stays as short as its owner wrote it
  const keys = steps(path), last = keys.pop(), trail = [];
  let object = draft;
  for (const key of keys) {
    if (typeof object[key] !== "object" || !object[key]) object[key] = {};
    trail.unshift([object, key]);
    object = object[key];
  }
  if ((value === "" || value == null) && !Array.isArray(object)) delete object[last]; else object[last] = value;
  for (const [parent, key] of trail) if (isSame(parent[key], {})) delete parent[key];
  changed();
}
function changed() {
  $("bar").hidden = !isDirty();
  $("allModels").replaceChildren(...allModels().map(name => h("option", {value: name})));
}
function take(view) {
  served = view; draft = structuredClone(view.config); text = null; problems = view.problems;
  $("place").textContent = view.server.address + " \u00b7 " + view.server.default;
  render();
}
const load = () => call("GET", "/api/config").then(take, error => { problems = faultsOf(error); render(); });
const dryRun = body => call("PUT", "/api/config", {...body, dry: true});

async function save() {
  const typed = flat(draft.APIKEY), isFirst = !served.exists;
  $("save").disabled = true;
  try {
    const edited = text !== null ? {text} : {config: draft};
    const view = await call("PUT", "/api/config", {...edited, version: served.version}), later = view.needs_restart.join(" and ");
    if (typed && !isStored(typed) && !typed.startsWith("$")) sessionStorage.setItem("ccr-key", apikey = typed);
    take(view);
    toast((later ? "Saved. For " + later + " run: ccr restart" : "Saved, and in use already.") + (isFirst ? " Now run: ccr code" : ""));
  } catch (error) {
    if (error.status === 409) return conflict();
    problems = faultsOf(error);
    problems.forEach(p => opened.add(providers()[/^providers\[(\d+)/i.exec(p.path)?.[1]]?.name));
    await show(text !== null ? "json" : tabOf(problems[0].path) || tab);
    const bad = document.querySelector("#view [aria-invalid]");
    (bad || $("alert")).scrollIntoView({block: "center"});
    bad?.focus();
  } finally { $("save").disabled = false; }
}
// Three-way: what I did not touch is theirs.
function merge(base, mine, theirs) {
  if (isSame(base, mine)) return theirs;
  if (!isObject(mine) || !isObject(theirs)) return mine;
  const pairs = [...new Set(Object.keys({...theirs, ...mine}))].map(key => [key, merge(base?.[key], mine[key], theirs[key])]);
  return Object.fromEntries(pairs.filter(([, value]) => value !== undefined));
}
async function conflict() {
  const choice = await ask("Somebody else changed config.json",
    h("p", "It was saved elsewhere after you opened it here. Nothing of yours is written yet."),
    [text === null ? ["Put my changes on top", "merge"] : ["Go back"], ["Load theirs, drop mine", "theirs"]]);
  if (!choice) return;
  const mine = draft, base = served.config;
  await load();
  if (choice !== "merge") return;
  draft = merge(base, mine, draft);
  render();
  toast("Your changes are on top of theirs. Save when it looks right.");
}

// --- views and fields
const TABS = {now: "Now", providers: "Providers", router: "Router", settings: "Settings", json: "JSON"};
function tabOf(path) {
  return !path ? "" : /^providers/i.test(path) ? "providers" : /^(Router|fallback)\b/.test(path) ? "router" : "settings";
}

async function show(name) {         // what was changed in the forms shows in the text, and the other way round
  try {
    if (tab === "json" && name !== "json") {
      if (text !== served.text) ({config: draft, problems} = await dryRun({text}));
      text = null;
    } else if (tab !== "json" && name === "json") ({text, problems} = isDirty() ? await dryRun({config: draft}) : served);
  } catch (error) {
    if (tab === "json") problems = faultsOf(error);
    render();
    return toast(tab === "json" ? "First put the text right." : wordsOf(error));
  }
  if (name !== tab) scrollTo(0, 0);
  tab = name;
  history.replaceState(null, "", "#" + name);
  render();
}
function render() {
  const focus = document.activeElement?.id;
  document.querySelector("[role=tablist]").replaceChildren(...Object.entries(TABS).map(([name, label]) => {
    const faults = problems.filter(p => tabOf(p.path) === name).length;
    return button([label, faults > 0 && h("span.badge", String(faults))], () => show(name), {role: "tab", id: "tab-" + name,
      "aria-selected": String(name === tab), "aria-controls": "view", tabindex: name === tab ? 0 : -1});
  }));
  $("view").setAttribute("aria-labelledby", "tab-" + tab);
  if (served) $("view").replaceChildren(...[VIEWS[tab]()].flat(9).filter(Boolean));
  changed();
  showProblems();
  if (served && tab === "now") { paintTurns(); paintStats(); askStats(); }
  if (focus && !$("dialog").open) $(focus)?.focus({preventScroll: true});
}
// Each fault at the field that its path names, or at the nearest thing around it; the rest on top.
function showProblems() {
  const trail = path => steps(path).join("/") + "/", size = e => e.dataset.path.length, isJson = tab === "json";
  const fields = [...document.querySelectorAll("[data-path]")].sort((a, b) => size(b) - size(a));
  const rest = problems.filter((problem, n) => {
    const best = fields.find(e => trail(problem.path).startsWith(trail(e.dataset.path)));
    const control = best?.querySelector("input, select, textarea"), path = problem.path !== best?.dataset.path && problem.path + ": ";
    best?.append(h("p.fault", {id: "fault-" + n, role: "alert"}, path, problem.message));
    control?.setAttribute("aria-invalid", "true");
    control?.setAttribute("aria-describedby", "fault-" + n);
    return !best && !isJson && (tab === "now" || ["", tab].includes(tabOf(problem.path)));
  });
  const warnings = isJson || isDirty() ? [] : list(served?.warnings).filter(words => tab === "now" || tabOf(words) === tab);
  $("alert").replaceChildren(...[
    served?.fault && h(".card.alert.stack", h("h2", "config.json cannot be read"), h("p", served.fault),
      h("p.dim", "You see the last good one, which ccr goes on with. Put the file right in an editor; or save here: ",
        "it is kept as a backup.")),
    rest.length > 0 && h(".card.alert", {role: "alert"}, rest.map(p => h("p", p.path && h("b", p.path + ": "), p.message))),
    warnings.length > 0 && h(".card.note.small", warnings.map(words => h("p", words)))].filter(Boolean));
}

const number = value => /^\d+(\.\d+)?$/.test(value.trim()) ? Number(value) : value.trim();
const json = value => { try { return value.trim() ? JSON.parse(value) : ""; } catch { return value; } };
const isStored = value => /^\*\*\*\d*$/.test(value);      // a stored secret is never here, only *** in its place
const typed = put => event => put(event.target.value.trim());
function select(value, choices, put, props) {
  const all = choices.map(list), e = h("select", {...props, onchange: typed(put)},
    all.map(([one, words]) => h("option", {value: one}, words || one)));
  if (!all.some(([one]) => one === value)) e.append(h("option", value));
  e.value = value;
  return e;
}
// The control for the value at `path`. kind: text, number, secret, check, or a list of choices.
function control(path, {kind = "text", normal = false, ...props} = {}) {
  const value = get(path), words = flat(value), stored = kind === "secret" && isStored(words), put = value => set(path, value);
  props = {id: "f-" + path, ...props};
  const isTruth = words => /^(true|false)$/.test(words), none = ["", props.placeholder || "not set"];
  if (Array.isArray(kind)) return select(words, [none, ...kind], words => put(isTruth(words) ? json(words) : words), props);
  if (kind === "check") return h("input", {...props, type: "checkbox", checked: value == null ? normal : words === "true",
    onchange: event => put(event.target.checked === normal ? "" : event.target.checked)});
  if (kind === "number") return h("input", {...props, inputmode: "decimal", value: words, oninput: typed(words => put(number(words)))});
  if (kind !== "secret") return h("input", {...props, value: words, oninput: typed(put)});
  const type = words => words && !words.startsWith("$") ? "password" : "text", shown = stored ? "" : words;
  return h("input", {...props, autocomplete: "new-password", type: type(shown), value: shown,
    placeholder: stored ? "stored; type to replace it" : props.placeholder || "the key itself, or $NAME of a variable",
    oninput: event => {
      const words = event.target.value.trim();
      event.target.type = type(words);
      put(words || (stored ? value : ""));
    }});
}
function field(path, label, {hint, ...how} = {}) {
  const e = control(path, how), below = hint && h("p.hint", hint);
  if (how.kind === "check") return h(".checked", {path}, h("label.check", e, label), below);
  return h("div", {path}, h("label", {for: e.id}, label), e, below);
}
const card = (title, ...kids) => h(".card.stack", h("h2", title), kids);
const note = (...kids) => h("p.dim.small", kids);

// --- Now: turns as they happen
const turns = new Map(), rows = new Map(), colours = new Map(), KEPT = 500;
let stats = {models: [], turns: {}, tokens: {}, start: Date.now() - 36e5, is_whole_day: true}, statsAt = 0, statsTimer;
let fresh = new Set(), frame = 0, limit = 20;
const answered = t => t.model ? t.provider + "," + t.model : "";
const isLive = t => t.status == null;
function colour(name) {
  if (!colours.has(name)) colours.set(name, "c" + Math.min(colours.size, 5));
  return colours.get(name);
}
const key = (name, more = "") => h("span.key." + colour(name), h("span", (name || "refused before routing") + more));

async function follow() {
  for (;;) {
    while (document.hidden) await new Promise(done => document.addEventListener("visibilitychange", done, {once: true}));
    const stop = new AbortController(), hide = () => document.hidden && stop.abort();
    let isLocked = false;
    document.addEventListener("visibilitychange", hide);
    try {
      const headers = {...auth(), accept: "text/event-stream"};
      const reply = await fetch("/api/turns", {headers, cache: "no-store", signal: stop.signal});
      isLocked = reply.status === 401;
      if (isLocked) { setLive("locked", "dim"); await askKey(); }
      if (!reply.ok) continue;
      [...turns.values()].filter(isLive).forEach(drop);
      setLive("live", "good");
      const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let rest = "", part; !(part = await reader.read()).done;) {
        const frames = (rest + part.value).split("\n\n");
        rest = frames.pop();
        frames.filter(text => text.startsWith("data: ")).forEach(text => addTurn(JSON.parse(text.slice(6))));
      }
    } catch { } finally {
      document.removeEventListener("visibilitychange", hide);
      if (!document.hidden && !isLocked) { setLive("not reachable", "bad"); await new Promise(done => setTimeout(done, 1500)); }
    }
  }
}
function setLive(words, tone) { $("live").textContent = words; $("live").className = "small " + tone; }
function drop(t) { turns.delete(t.request_id); rows.get(t.request_id)?.remove(); rows.delete(t.request_id); }
function addTurn(t) {
  t.request_id ||= t.time + " " + turns.size;        // refused before it had one
  turns.set(t.request_id, t);
  fresh.add(t.request_id);
  if (turns.size > KEPT) drop(turns.values().next().value);
  frame ||= requestAnimationFrame(() => { frame = 0; if (tab === "now" && served) { paintTurns(); askStats(); } });
}

function viewNow() {
  rows.clear();
  fresh = new Set(turns.keys());
  const plot = (id, title) => h(".card", h(".row", h("h2.grow", title), h("span.dim.small", {id: id + "Sum"})),
    h(".plot", {id, tabindex: 0, role: "img"}), h(".legend", {id: id + "Key"}));
  const columns = {"Time": "w6", "Task": "w7", "Asked for": "w10", "Answered by": "", "In": "num.w5", "Cached": "num.w5",
    "Out": "num.w5", "First token": "num.w6", "Tokens/s": "num.w6", "Status": "num.w6"};
  const head = Object.entries(columns).map(([text, style]) => h("th." + style, text));
  return [
    served.server.is_demo && card("Welcome. ccr is running, and its built-in demo model answers.",
      h("p", "To a real model it takes three steps:"),
      h(".row", "1. A provider: its address, a key, its models.",
        button("Add a provider", () => show("providers"), {style: ".main"})),
      h("p", "2. Which model answers which task. The first model you pick is the default."),
      h("p", "3. In a project folder: ", h("code", "ccr code"))),
    h(".tiles", {id: "tiles"}),
    h(".plots", plot("turnPlot", "Turns per minute"), plot("tokenPlot", "Tokens per minute")),
    card("Turns",
      h("p.dim", {id: "noTurns"}, "None since ccr started. Run ", h("code", "ccr code"), " in a project folder."),
      h("table", {id: "turns", hidden: true}, h("thead", h("tr", head)), h("tbody", {id: "rows"})),
      button("Show more", () => { limit += 50; paintTurns(); }, {id: "more", hidden: true})),
    h(".card.stack", {id: "models"})];
}
function paintTurns() {
  for (const id of fresh) {
    const old = rows.get(id), row = turns.has(id) && turnRow(turns.get(id));
    if (!row) continue;
    if (old) old.replaceWith(row); else $("rows").prepend(row);
    rows.set(id, row);
  }
  fresh.clear();
  $("turns").hidden = !turns.size;
  $("noTurns").hidden = turns.size > 0;
  $("more").hidden = turns.size <= limit;
  [...$("rows").children].forEach((row, n) => { row.hidden = n >= limit; });
}
const cell = (label, text, ...more) => h("td.num", {"data-label": text ? label : null}, text, more);
function turnRow(t) {
  const time = clock(t.time, "2-digit"), ended = isLive(t) ? () => "" : count;
  const tried = list(t.fallbacks).filter(f => f.model !== answered(t)).map(f => f.model + " (" + f.status + ")").join(", ");
  const state = isLive(t) ? h("span.good", t.first_ms == null ? "waiting" : "answering") :
    t.error ? h("span.bad", "failed " + t.status) : h("span.dim", "ok");
  const open = event => { event.stopPropagation(); details(t); };
  return h("tr", {onclick: open}, h("td", button(time, open, {style: ".link", label: "Details of " + time})),
    h("td.cut", t.rule && h("span.chip.cut", t.rule)), h("td.dim.full", {"data-label": t.asked ? "asked for" : null}, t.asked),
    h("td.full", answered(t) || "\u2013", t.error ? h("span.bad.small", t.error) : h("span.dim.small", t.reason),
      tried && h("span.warn.small", "after " + tried)),
    cell("in", ended(t.input_tokens)), cell("cached", t.cached_tokens ? count(t.cached_tokens) : ""),
    cell("out", ended(t.output_tokens)), cell("first", span(t.first_ms)), cell("tokens/s", rate(t.tokens_per_s)), h("td.num.push", state));
}
function details(t) {
  const tries = value => value.map(f => f.model + " answered " + f.status + ": " + f.error).join("\n");
  const words = (name, value) => name === "time" ? new Date(value).toLocaleString() : name === "cost" ? money(value) :
    name === "fallbacks" ? tries(value) : typeof value === "number" ? count(value) : flat(value);
  const facts = Object.entries({...t, status: t.status ?? "under way"}).filter(([, value]) => value && value.length !== 0);
  ask("Turn", h("dl", facts.map(([name, value]) => [h("dt", name.replaceAll("_", " ")), h("dd", words(name, value))])), [["Close"]]);
}

// At most every 3 s, and only while somebody looks.
async function askStats() {
  clearTimeout(statsTimer);
  const wait = Math.max(0, statsAt + 3000 - Date.now());
  if (wait || document.hidden) { statsTimer = setTimeout(askStats, wait || 5000); return; }
  statsAt = Date.now();
  try { stats = await call("GET", "/api/stats"); } catch { }
  if (tab === "now") { paintStats(); statsTimer = setTimeout(askStats, 20000); }
}
function paintStats() {
  const all = stats.models, since = stats.is_whole_day ? " today" : " since start";
  const sum = name => all.reduce((total, m) => total + (m[name] || 0), 0);
  const [seen, input, failed] = ["turns", "input_tokens", "errors"].map(sum);
  const first = all.find(m => m.first_ms != null), isPriced = all.some(m => m.cost != null);
  const tile = (label, value, more = "\u00a0", tone = "") =>
    h(".card.tile", h("span.dim.small", label), h("b" + tone, value), h("span.dim.small", more));
  $("tiles").replaceChildren(tile("Turns" + since, count(seen), (stats.in_flight || "none") + " under way"),
    tile("Tokens in", short(input), Math.round(100 * sum("cached_tokens") / (input || 1)) + " % from cache"),
    tile("Tokens out", short(sum("output_tokens"))),
    tile("First token", first ? span(first.first_ms) : "\u2013", first?.model),
    tile("Failed", count(failed), three(100 * failed / (seen || 1)) + " % of turns", failed ? ".bad" : ""),
    tile("Cost" + since, isPriced ? money(sum("cost")) : "\u2013", isPriced ? "by your prices" : "no prices set"));
  all.forEach(m => colour(m.model));
  drawPlot("turnPlot", stats.turns, "turns");
  drawPlot("tokenPlot", stats.tokens, "tokens");
  const line = (style, width) => h("rect." + style, {width: width + "%", height: 6, rx: 3});
  const most = name => Math.max(...all.map(m => m[name] || 0));
  const bar = (label, m, name, text) => cell(label, text,
    text && h("svg.meter", {"aria-hidden": "true"}, line("track", 100), line(colour(m.model), 100 * m[name] / most(name))));
  const head = h("tr", h("th", "Model"), ["Turns", "Failed", "In", "Cached", "Out", "Cost"].map(text => h("th.num", text)),
    ["First token", "Tokens/s"].map(text => h("th.num.w8", {title: "median of the last 500"}, text)));
  const some = n => n ? short(n) : "";
  const row = m => h("tr", h("td.full", key(m.model)), cell("turns", count(m.turns)), cell("failed", some(m.errors)),
    cell("in", some(m.input_tokens)), cell("cached", some(m.cached_tokens)), cell("out", some(m.output_tokens)),
    cell("cost", money(m.cost)), bar("first", m, "first_ms", span(m.first_ms)),
    bar("tokens/s", m, "tokens_per_s", rate(m.tokens_per_s)));
  $("models").replaceChildren(h("h2", "By model," + since),
    all.length ? h("table", h("thead", head), h("tbody", all.map(row))) : h("p.dim", "Nothing yet."));
}
// Stacked bars, one for each minute of the last hour; pointer and arrow keys read them.
function drawPlot(id, series, unit) {
  const box = $(id), W = Math.max(box.clientWidth, 240), H = 160, left = 46, floor = H - 22, top = 8, step = (W - left) / 60;
  const names = [...colours.keys()].filter(name => series[name]), minutes = [...Array(60).keys()];
  const totals = minutes.map(i => names.reduce((all, name) => all + series[name][i], 0)), sum = totals.reduce((a, b) => a + b);
  const peak = Math.max(...totals), rough = Math.max(peak, 4) / 4, ten = 10 ** Math.floor(Math.log10(rough));
  const grid = ten * [1, 2, 5, 10].find(n => n * ten >= rough), ceiling = Math.max(1, Math.ceil(peak / grid)) * grid;
  const x = i => left + i * step, y = value => floor - value / ceiling * (floor - top), at = i => clock(stats.start + i * 60000);
  const parts = [], label = (x, y, anchor, text) => parts.push(h("text", {x, y, "text-anchor": anchor}, text));
  for (let value = 0; value <= ceiling; value += grid) {
    parts.push(h("line", {x1: left, x2: W, y1: y(value), y2: y(value)}));
    label(left - 8, y(value) + 4, "end", short(value));
  }
  [0, 15, 30, 45].forEach(i => label(x(i), H - 5, i ? "middle" : "start", at(i)));
  label(W, H - 5, "end", "now");
  if (!peak) label((left + W) / 2, H / 2, "middle", "nothing in the last hour");
  for (const i of minutes) {
    let base = 0;
    for (const name of names.filter(name => series[name][i])) {
      const low = y(base), high = y(base += series[name][i]);
      parts.push(h("rect." + colour(name), {x: x(i) + 1, width: Math.max(1, step - 2), y: high, height: low - high}));
    }
  }
  const mark = h("rect.at", {y: top, height: floor - top, width: step, visibility: "hidden"}), tip = h(".tip", {hidden: true});
  let place = 60;
  const read = i => {
    tip.hidden = i == null;
    mark.setAttribute("visibility", i == null ? "hidden" : "visible");
    if (i == null) return;
    place = Math.min(59, Math.max(0, i));
    mark.setAttribute("x", x(place));
    tip.replaceChildren(h("b", at(place) + " \u00b7 " + count(totals[place]) + " " + unit),
      ...names.filter(name => series[name][place]).map(name => h("div", key(name, " " + count(series[name][place])))));
    const right = x(place) + step + 8, room = W - tip.offsetWidth;
    tip.style.left = Math.max(0, place < 30 ? Math.min(right, room) : x(place) - tip.offsetWidth - 8) + "px";
  };
  box.onpointermove = event => {
    const i = Math.floor((event.clientX - box.getBoundingClientRect().left - left) / step);
    read(i < 0 ? null : i);
  };
  box.onpointerleave = box.onblur = () => read(null);
  box.onkeydown = event => {
    const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (by) { event.preventDefault(); read(place + by); }
  };
  const told = `${count(sum)} ${unit} in the last hour, at most ${count(peak)} a minute. Arrow keys read single minutes.`;
  box.setAttribute("aria-label", told);
  box.replaceChildren(h("svg", {width: W, height: H, "aria-hidden": "true"}, parts, mark), tip);
  $(id + "Sum").textContent = "last hour: " + short(sum);
  $(id + "Key").replaceChildren(...names.map(name => key(name)));
}
addEventListener("resize", () => { if (tab === "now" && served) paintStats(); });

// --- Providers
function viewProviders() {
  const all = providers();
  return [all.map(providerCard), card(all.length ? "Add a provider" : "Add your first provider",
    h("p.dim", all.length ? "Anything that speaks OpenAI's, Anthropic's or Gemini's API." :
      "Where do your models run? Nothing is written before you press Save."),
    h(".row", [...served.hosts, ["", "Another one", "", ""]].map(host => button(host[1], () => addProvider(host)))))];
}
function addProvider([name, , url, variable]) {
  const place = providers().length, key = served.variables[variable] && {api_key: "$" + variable};
  draft[providersKey()] = [...providers(), {name, api_base_url: url, ...key, models: []}];
  opened.add(name);
  render();
  $("card-" + place).scrollIntoView();
  $(`f-${providersKey()}[${place}].${name ? "api_key" : "name"}`).focus();
}
function keyState(value) {
  const keys = list(value).map(flat).filter(Boolean), names = keys.filter(one => one.startsWith("$"));
  const missing = names.filter(name => served.variables[name.replace(/[${}]/g, "")] === false);
  if (missing.length) return [missing.join(", ") + " is not set", ".warn"];
  if (!keys.length) return ["no key", ".dim"];
  if (names.length) return ["key from " + names.join(", "), ".good"];
  return [keys.length > 1 ? keys.length + " keys" : isStored(keys[0]) ? "key is set" : "new key", ".good"];
}
function providerCard(p, n) {
  const path = `${providersKey()}[${n}]`, isOpen = opened.has(p.name), models = list(p.models), old = structuredClone(draft);
  const [words, tone] = keyState(p.api_key), [up, down, remove] = arrows(draft[providersKey()], n, p.name, render);
  const toggle = () => { if (!opened.delete(p.name)) opened.add(p.name); render(); };
  remove.addEventListener("click", () => toast(p.name + " is removed.", () => { draft = old; render(); }));
  return h("section.card.stack", {id: "card-" + n, path, label: "Provider " + p.name},
    h(".row.wrap", h("h2.grow", h("span", {id: "title-" + path}, p.name || "New provider"), " ", h("span.chip" + tone, words), " ",
        h("span.chip.dim", models.length === 1 ? "1 model" : models.length + " models")),
      button("Test", event => testProvider(p, path, event.target)),
      button(isOpen ? "Close" : "Edit", toggle, {"aria-expanded": String(isOpen), id: "edit-" + n}), up, down, remove),
    h("p.small", {role: "status", id: "said-" + path, hidden: true}),
    isOpen ? providerForm(p, path) : note(p.api_base_url, h("br"), models.map(modelName).join(" \u00b7 ")));
}
const FORMATS = ["openai", "anthropic", "gemini", "openai-responses", "vertex-gemini", "vertex-claude"];
function providerForm(p, path) {
  const keys = Array.isArray(p.api_key) && p.api_key, at = path + ".api_key";
  let name = p.name;
  const renamed = value => Array.isArray(value) ? value.map(renamed) :
    flat(value).startsWith(name + ",") ? p.name + value.slice(name.length) : value;
  const follow = () => {               // routes and prices follow a renamed provider
    for (const part of ["Router", "fallback", "prices"].filter(part => isObject(draft[part])))
      draft[part] = Object.fromEntries(Object.entries(draft[part]).map(([one, value]) => [renamed(one), renamed(value)]));
    opened.add(name = p.name);
    $("title-" + path).textContent = name;
    changed();
  };
  const keyRow = (_, n) => h(".row.line",
    control(`${at}[${n}]`, {kind: "secret", id: "f-" + at + (n || ""), label: "Key " + (n + 1)}),
    arrows(keys, n, "key " + (n + 1), render)[2]);
  const more = button("One more key", () => { p.api_key = [...list(p.api_key), ""]; render(); }, {style: ".link"});
  return h(".stack", h(".grid", field(path + ".name", "Name", {onchange: follow}),
      field(path + ".api_base_url", "API address", {placeholder: "https://host/v1", hint: "The whole endpoint, or up to /v1."}),
      h("div", {path: at}, h("label", {for: "f-" + at}, keys ? "Keys, which take turns" : "Key"),
        keys ? h(".stack", keys.map(keyRow)) : control(at, {kind: "secret"}),
        h("p.hint", "Stored keys never come back to this page. ", more)),
      field(path + ".format", "Format", {kind: FORMATS, placeholder: "told from the address"}),
      field(path + ".max_concurrent", "Requests at once", {kind: "number", placeholder: "no limit"}),
      field(path + ".max_concurrent_models", "Models at once", {kind: "number", placeholder: "no limit"})),
    modelForm(p, path), transformerForm(p, path));
}
function suggest(p) {         // the first model that is picked answers, until somebody says otherwise
  const first = modelName(list(p.models)[0]);
  if (!list(get("Router.default")).length && p.name && first) set("Router.default", p.name + "," + first);
}
function modelForm(p, path) {
  const models = list(p.models);
  const add = () => { p.models = [...models, ""]; render(); $(`f-${path}.models[${models.length}]name`).focus(); };
  const cells = (model, n) => {          // a model is a plain string until more than its name is known
    const at = `${path}.models[${n}]`, grow = () => { if (!isObject(p.models[n])) p.models[n] = {name: p.models[n]}; };
    const shrink = () => { if (Object.keys(p.models[n]).join() === "name") p.models[n] = p.models[n].name; suggest(p); changed(); };
    const part = (name, label, how) => {
      const where = at + (name === "name" && !isObject(model) ? "" : "." + name), onfocus = name !== "name" && grow;
      return h("." + name, {path: where}, control(where, {id: "f-" + at + name, label, onfocus, onblur: shrink, ...how}));
    };
    return [part("name", "Model"), part("context", "Context window in tokens", {kind: "number", placeholder: "context"}),
      part("max_tokens", "Longest answer in tokens", {kind: "number", placeholder: "longest"}),
      part("vision", "Sees images", {kind: [[true, "sees images"], [false, "no images"]], placeholder: "images?"}),
      arrows(models, n, "the model " + modelName(model), render)[2]];
  };
  const heads = ["Name", "Context window", "Longest answer", "Images", ""].map(text => h("span.th.dim.small", text));
  return h("div", {path: path + ".models"}, h(".row", h("h3", "Models"),
      button("Ask the provider for its models", event => askModels(p, path, event.target)), button("Add one by hand", add)),
    models.length ? h(".models", heads, models.map(cells)) : h("p.hint", "None yet. The first one becomes the default."));
}
const askModels = (p, path, source) => busy(path, source, async () => {
  const address = "/api/providers/" + encodeURIComponent(p.name || "new") + "/models";
  const found = (await call("POST", address, {provider: {...p, models: []}})).models, chosen = new Set(list(p.models).map(modelName));
  const choose = event => chosen[event.target.checked ? "add" : "delete"](event.target.value);
  const lines = found.map(m => h("label.check",
    h("input", {type: "checkbox", value: m.name, checked: chosen.has(m.name), onchange: choose}),
    h("span.grow", m.name), m.context && h("span.dim.small", short(m.context))));
  const has = (line, words) => line.textContent.toLowerCase().includes(words.toLowerCase());
  const sift = typed(words => lines.forEach(line => { line.hidden = !has(line, words); }));
  const filter = h("input", {type: "search", label: "Filter", placeholder: "Filter " + found.length + " models", oninput: sift});
  const body = [filter, h(".list", lines.length ? lines : "It lists none. Add them by hand.")];
  if (!await ask("Models of " + p.name, body, [["Use these", true], ["Cancel"]])) return;
  const kept = list(p.models).filter(m => chosen.has(modelName(m))), had = kept.map(modelName);
  const added = found.filter(m => chosen.has(m.name) && !had.includes(m.name));
  p.models = [...kept, ...added.map(m => m.context ? {name: m.name, context: m.context} : m.name)];
  suggest(p);
  render();
});
const testProvider = (p, path, source) => busy(path, source, async () => {
  say(path, "Asking " + p.name + " \u2026", "dim");
  const reply = await call("POST", "/api/providers/test", {provider: p});
  if (!reply.ok) throw reply;
  say(path, `${reply.model} answered in ${span(reply.ms)}: \u201c${reply.text.trim()}\u201d`, "good");
});
async function busy(path, source, work) {
  source.disabled = true;
  try { await work(); } catch (error) { say(path, wordsOf(error), "bad"); } finally { source.disabled = false; }
}
function say(path, words, tone) {
  const e = $("said-" + path);
  if (e) { e.hidden = false; e.className = "small " + tone; e.textContent = words; }
}

// transformer: {use: [...], "<model>": {use: [...]}}; an entry is "name" or ["name", {options}]
function transformerForm(p, path) {
  const t = isObject(p.transformer) ? p.transformer : {}, isScope = name => name !== "use" && Array.isArray(t[name]?.use);
  const scopes = ["use", ...Object.keys(t).filter(isScope)], place = scope => scope === "use" ? "use" : scope + ".use";
  const read = (entry, n, scope) => ({scope, name: list(entry)[0], options: isObject(entry[1]) ? {...entry[1]} : {},
    path: `${path}.transformer.${place(scope)}[${n}]`});
  const entries = scopes.flatMap(scope => list((scope === "use" ? t : t[scope]).use).map((entry, n) => read(entry, n, scope)));
  const write = () => {
    const next = Object.fromEntries(Object.entries(t).filter(([name]) => !scopes.includes(name)));
    for (const {scope, name, options} of entries) {
      const uses = scope === "use" ? next.use ||= [] : (next[scope] ||= {use: []}).use;
      uses.push(isSame(options, {}) ? name : [name, options]);
    }
    set(path + ".transformer", isSame(next, {}) ? "" : next);
  };
  const redo = () => { write(); render(); };
  const pick = (value, choices, label, put) => select(value, choices, value => { put(value); redo(); }, {label});
  const row = (entry, n) => {
    const known = transformers.find(one => one.names.includes(String(entry.name).toLowerCase()));
    const put = (name, value) => { if (value === "") delete entry.options[name]; else entry.options[name] = value; write(); };
    const option = o => {
      const now = flat(entry.options[o.name]), take = words => put(o.name, o.type === "str" ? words : json(words));
      return h("div", h("label", o.name), o.type === "bool" ? pick(now, [["", "not set"], "true", "false"], o.name, take) :
        h("input", {value: now, label: o.name, oninput: typed(take)}), h("p.hint", o.about));
    };
    const oninput = typed(words => { entry.options = isObject(json(words)) ? json(words) : {}; write(); });
    const free = h("input.mono", {label: "Options as JSON", placeholder: "options as JSON, if any", oninput,
      value: isSame(entry.options, {}) ? "" : flat(entry.options)});
    const names = transformers.map(one => one.name), models = [["use", "for all models"], ...list(p.models).map(modelName)];
    return h(".use.stack", {path: entry.path}, h(".row.line.wrap",
        pick(known?.name || entry.name, names, "Transformer", name => { entry.name = name; entry.options = {}; }),
        pick(entry.scope, models, "For which models", scope => { entry.scope = scope; }),
        arrows(entries, n, "the transformer " + entry.name, redo)),
      known && h("p.hint", known.about), known?.options.length ? h(".grid", known.options.map(option)) : free);
  };
  const add = () => { entries.push({scope: "use", name: "maxtoken", options: {}}); redo(); };
  const onchange = event => set(path + ".transformer", event.target.checked ? "" : {use: []});
  const defaults = h("input", {type: "checkbox", checked: !Array.isArray(t.use), onchange});
  return h(".stack", {path: path + ".transformer"}, h(".row", h("h3", "Transformers"), button("Add a transformer", add)),
    entries.length ? entries.map(row) : h("label.check.small", defaults, "ccr's own defaults for this host and its models"));
}

// --- Router
const TASKS = {default: "Whatever no other rule claims.",
  background: "Titles, summaries and other small jobs; models called haiku.",
  think: "Plan mode, effort xhigh or max, thinking switched on, or the word ultrathink.",
  longContext: "More tokens than the threshold, or a session that was over it last time.",
  webSearch: "The request brings a web search tool.", image: "The newest message holds an image."};
const CHOICES = {opus: "The client asks for an Opus model, and no task rule claims the turn.", sonnet: "The same for Sonnet.",
  haiku: "The same for Haiku.", fable: "The same for Fable.", explicit: "The client named a model: only this list may take over.",
  subagent: "The same for a subagent's model."};

function ruleRow([rule, words]) {
  const path = "Router." + rule, targets = list(get(path)), inRoute = targets.length > 1, isNamed = /explicit|subagent/.test(rule);
  const others = [...targets.slice(1), ...list(draft.fallback?.[rule])], redo = () => { store(); render(); };
  const store = () => {           // fallbacks stay where the file has them
    if (inRoute) set(path, [targets[0], ...others]);
    if (!inRoute || draft.fallback) set("fallback." + rule, inRoute || !others.length ? "" : others);
  };
  const model = (value, label, id, put) =>
    h("input", {list: "allModels", id, label, value: flat(value), placeholder: "none", oninput: typed(put)});
  const other = (target, n) => h(".row.line.wrap.use",
    model(target, `Fallback ${n + 1} of ${rule}`, `f-fallback.${rule}${n}`, value => { others[n] = value; store(); }),
    arrows(others, n, "fallback " + (n + 1), redo));
  const add = () => { others.push(""); redo(); $(`f-fallback.${rule}${others.length - 1}`).focus(); };
  return h(".rule", h("div", h("h3", rule), h("p.hint", words)), h(".stack", {path},
    !isNamed && model(targets[0], "Model for " + rule, "f-" + path,
      value => set(path, inRoute ? [value, ...targets.slice(1)] : value)),
    draft.fallback !== false && (isNamed || flat(targets[0]) + others) && h(".stack", {path: "fallback." + rule},
      others.map(other), button("Add a fallback", add, {style: ".link.small", id: "add-" + rule})),
    rule === "longContext" && field("Router.longContextThreshold", "Threshold in tokens", {kind: "number", placeholder: "60000"})));
}
function viewRouter() {
  const rows = rules => h("div", Object.entries(rules).map(ruleRow));
  const onchange = event => { if (event.target.checked) delete draft.fallback; else draft.fallback = false; render(); };
  return [!allModels().length && h(".card.note.row", "There are no models to choose from yet.",
      button("Add a provider", () => show("providers"), {style: ".main"})),
    h(".cols", h("div",
      card("Which model for which task", note("The first that applies and has a model: named, subagent, image, long context, web ",
        "search, background, think, the client's choice, default."), rows(TASKS)),
      card("The client's choice", note("Optional: for what /model selects, and for models named outright."), rows(CHOICES)),
      card("When a model is busy or down",
        h("label.check", {path: "fallback"},
          h("input", {type: "checkbox", id: "fallback", checked: draft.fallback !== false, onchange}), "Another one takes over"),
        h("p.hint", "First a rule's own fallbacks; if there are none, the other models of this page. Never once an answer has begun."))),
      tryBox())];
}
const tried = {prompt: "", model: "claude-sonnet-4-5"};
function tryBox() {
  const out = h(".stack", {role: "status", id: "tryOut"}), keep = event => { tried[event.target.name] = event.target.value; };
  const run = async event => {
    event.preventDefault();
    const request = json(tried.prompt);
    try {
      const asked = isObject(request) ? {request} : {prompt: tried.prompt || "hi"};
      const r = await call("POST", "/api/explain", {...asked, model: tried.model, config: draft});
      out.replaceChildren(h("p", h("b", r.model)), h("p.small", h("span.chip", r.rule), " ", r.reason),
        note(count(r.tokens) + " tokens" + (r.fallbacks.length ? "; after it " + r.fallbacks.join(", ") : "")),
        h("dl.small", r.rules.map(one => [h("dt", one.rule), h(one.rule === r.rule ? "dd" : "dd.dim", one.reason || "does not apply")])));
    } catch (error) { out.replaceChildren(h("p.bad.small", wordsOf(error))); }
  };
  return h("form.card.stack", {onsubmit: run}, h("h2", "Try it"),
    h("p.hint", "Which rule fires, and why, by this page as it is, saved or not. Nothing is sent."),
    h("div", h("label", {for: "tryPrompt"}, "Prompt"), h("textarea", {id: "tryPrompt", name: "prompt", rows: 6,
      placeholder: "Some text, or a whole request as JSON", value: tried.prompt, oninput: keep})),
    h("div", h("label", {for: "tryModel"}, "The client asks for"),
      h("input", {id: "tryModel", name: "model", value: tried.model, oninput: keep})),
    h("button.main", {id: "try"}, "Which model?"), out);
}

// --- Settings
const SETTINGS = {
  "Access": {HOST: {placeholder: "127.0.0.1", hint: "Counts after a restart."},
    PORT: {kind: "number", placeholder: "3456", hint: "Counts after a restart."},
    APIKEY: {kind: "secret", hint: "Clients must send it. Without one, ccr listens on this machine only."},
    WATCH: {kind: "check", normal: true, label: "Take over changes of the file by itself"}},
  "Requests": {API_TIMEOUT_MS: {kind: "number", placeholder: "600000", hint: "How long a provider may be silent, in milliseconds."},
    PROXY_URL: {kind: "secret", placeholder: "http://host:port", hint: "For all providers that are not on this machine."},
    forceUseImageAgent: {kind: "check", label: "Describe even the newest images to models that cannot see"},
    NON_INTERACTIVE_MODE: {kind: "check", label: "ccr code runs without a terminal"}},
  "Log": {LOG_LEVEL: {kind: ["fatal", "error", "warn", "info", "debug", "trace"], placeholder: "info",
      hint: "Prompts and answers from debug on; keys never."}, LOG: {kind: "check", normal: true, label: "Keep a log"}},
  "Web search": {"WebSearch.engine": {label: "Engine", kind: ["ollama", "searxng", "brave", "tavily"]},
    "WebSearch.api_key": {label: "Key", kind: "secret"}, "WebSearch.url": {label: "Address", placeholder: "for searxng"},
    "WebSearch.max_results": {label: "Results at most", kind: "number", placeholder: "8"}}};

function viewSettings() {
  const grid = fields => h(".grid", Object.entries(fields).map(([path, how]) => field(path, how.label || path, how)));
  const all = Object.entries(get("prices") || {}).map(([name, value]) => [name, [...list(value)]]);
  const store = () => set("prices", all.length ? Object.fromEntries(all) : ""), redo = () => { store(); render(); };
  const price = (one, n) => {
    const name = h("input", {list: "allModels", label: "Model", value: one[0], oninput: typed(words => { one[0] = words; store(); })});
    const cells = ["input", "cached", "output"].map((placeholder, i) => h("input", {label: placeholder + " price of " + one[0],
      placeholder, inputmode: "decimal", value: flat(one[1][i]), oninput: typed(words => { one[1][i] = number(words); store(); })}));
    return [h(".name", {path: "prices." + one[0]}, name), cells, arrows(all, n, "the price of " + one[0], redo)[2]];
  };
  const unpriced = () => allModels().find(name => !all.some(one => one[0] === name)) || "provider,model";
  const add = () => { all.push([unpriced(), [0, 0, 0]]); redo(); };
  const paths = name => list(served.config[name]).map(one => flat(one?.path ?? one)).join("\n");
  const fixed = [...served.locked.map(name => [name, paths(name)]), ["the file", served.path]];
  return [Object.entries(SETTINGS).map(([title, fields]) => card(title, grid(fields))),
    card("Prices", note("Dollars per million tokens: input, cached input, output. Then Now shows costs."),
      h(".prices", {path: "prices"}, all.map(price)), button("Add a price", add)),
    card("Only in the file", note("What these name runs or is read as you: they cannot be changed over the web."),
      h("dl", fixed.map(([name, value]) => [h("dt", name), h(value ? "dd" : "dd.dim", value || "not set")])),
      note("The three versions before the last saves are kept beside the file."))];
}

// --- JSON
function viewJson() {
  text ??= served.text;
  const gutter = h("pre", {"aria-hidden": "true"}), bad = problems.map(p => p.line);
  const follow = () => { gutter.scrollTop = area.scrollTop; }, mark = n => h(bad.includes(n) ? "b.bad" : "span", n + "\n");
  const paint = () => { gutter.replaceChildren(...area.value.split("\n").map((_, n) => mark(n + 1))); follow(); };
  const area = h("textarea.mono", {id: "json", label: "config.json", wrap: "off", value: text, onscroll: follow,
    oninput: () => { text = area.value; paint(); changed(); }});
  const go = p => {
    const lines = area.value.split("\n"), start = lines.slice(0, p.line - 1).join("\n").length + (p.line > 1) + (p.column || 1) - 1;
    area.focus();
    area.setSelectionRange(start, start + 1);
    area.scrollTop = (p.line - 6) * area.scrollHeight / lines.length;
  };
  paint();
  const where = p => p.line && button("line " + p.line + (p.column ? ", column " + p.column : ""), () => go(p), {style: ".link"});
  const fault = p => h("p.fault", {role: "alert"}, where(p), " ", p.path && p.path + ": ", p.message);
  const about = note("The file itself: ", served.path, ". *** stands for a stored secret; leave it, and the secret stays.");
  return card("config.json", about, problems.map(fault), h(".editor", gutter, area));
}

// --- start
const VIEWS = {now: viewNow, providers: viewProviders, router: viewRouter, settings: viewSettings, json: viewJson};
document.querySelector("[role=tablist]").addEventListener("keydown", async event => {
  const names = Object.keys(TABS), at = names.indexOf(tab), step = {ArrowRight: 1, ArrowLeft: 4}[event.key];
  if (step) { event.preventDefault(); await show(names[(at + step) % 5]); $("tab-" + tab).focus(); }
});
$("save").onclick = save;
$("discard").onclick = () => {
  const mine = draft, old = text;
  take(served);
  toast("Your changes are dropped.", () => { draft = mine; text = old; render(); });
};
addEventListener("keydown", event => {
  if ((event.ctrlKey || event.metaKey) && event.key === "s") { event.preventDefault(); if (isDirty()) save(); }
});
addEventListener("beforeunload", event => { if (isDirty()) event.preventDefault(); });
if (location.hash.slice(1) in TABS) tab = location.hash.slice(1);
load().then(() => call("GET", "/api/transformers")).then(reply => {
  transformers = reply.transformers;
  if (tab === "providers") render();
}, () => {});
follow();
</script>
</body>
</html>
"""


# === 15. main =======================================================================

def main(argv) -> int:
    """Runs one command and returns its exit status; what goes wrong is told on stderr, in words."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:    # closed: then the next file that is opened would be taken for it
            setattr(sys, name, open(os.devnull, "w" if fd else "r"))
            os.set_inheritable(fd, True)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")    # whatever the locale
    try:
        status = run_command(argv)
        sys.stdout.flush()
        return status
    except ConfigError as e:
        for problem in e.problems:
            tell(problem)
    except ApiError as e:
        tell(e.message)
    except CommandError as e:
        tell(str(e))
        return e.status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:    # as in `ccr logs | head`
        hush(sys.stdout)
        return 141
    except OSError as e:    # the disk is full, a folder is not ours
        tell(str(e))
        hush(sys.stdout)
    except Exception as e:
        tell("a fault of ccr itself: %s: %s (%s)" % (type(e).__name__, e, where_raised(e)))
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
