"""Redaction: passwords, tokens and keys taken out of whatever is shown, logged, posted or stored; one function for all."""

import os
import re
from urllib.parse import unquote

from mlpipes.store.environment import TABLE

HIDDEN = "***"
_SHORTEST = 4
"""Characters of a value that is searched for: shorter ones occur in any text."""
_NAMES = re.compile(
    r"PASSWORD|PASSWD|SECRET|TOKEN(?!S|IZER)|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|WEBHOOK", re.IGNORECASE
)
_HARMLESS = re.compile(r"_(PATH|FILE|DIR|URL|URI|TYPE|MODE)$|^TOKENIZERS_", re.IGNORECASE)
_KEY = (
    r"(?:pass(?:word|wd|phrase)?|pwd|secret|(?:secret_?)?access_?key(?:_?id)?|api_?key|private_?key|[a-z_]*token|"
    r"sig|signature)"
)
_PATTERNS = (
    # Where a service takes messages, the path is the secret; before what hides the user's part of any address.
    (
        re.compile(
            r"(https://(?:hooks\.slack\.com|discord(?:app)?\.com/api/webhooks|[\w.-]+\.webhook\.office\.com))/[^\s'\"]+"
        ),
        r"\1/***",
    ),
    # `scheme://user:password@host`. The last @ before the path, for passwords are not always quoted.
    (re.compile(r"\b([a-z][a-z0-9+.-]*://)[^\s/?#'\"<>]*@", re.IGNORECASE), r"\1***@"),
    (re.compile(rf"([?&](?:x-amz-[a-z-]+|{_KEY}|ssl{_KEY}|key)=)[^&\s'\"]+", re.IGNORECASE), r"\1***"),
    (re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9._~+/-]{8,}=*"), r"\1 ***"),
    (re.compile(rf"((?<![a-z])[\"']?{_KEY}[\"']?\s*=\s*[\"']?)(?!\*\*\*)[^\s\"',;&}}]+", re.IGNORECASE), r"\1***"),
    (re.compile(rf"([\"']{_KEY}[\"']\s*:\s*[\"'])[^\"']+", re.IGNORECASE), r"\1***"),
    (
        re.compile(
            r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bhf_[A-Za-z0-9]{16,}|\bgh[opsru]_[A-Za-z0-9]{20,}|\bxox[abprs]-[\w-]{10,}"
        ),
        HIDDEN,
    ),
)


def redact(text: str) -> str:
    """A text without what must not leave this process: the secrets of the environment, and what looks like one."""
    for secret in sorted(_known(), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def is_secret(name: str) -> bool:
    """Whether an environment variable's value is never shown, by the table or by its name."""
    variable = TABLE.get(name)
    return variable.secret if variable else bool(_NAMES.search(name)) and not _HARMLESS.search(name)


def _known() -> set[str]:
    """Values of secret variables, and the passwords in the addresses that others hold; as written and unquoted."""
    found = set()
    for name, value in os.environ.items():
        if is_secret(name):
            found.add(value)
            if "://" in value:  # a webhook: its path alone would do
                found.add("/" + value.partition("://")[2].partition("/")[2])
        elif "://" in value and "@" in value and not re.search(r"\s", value):
            found.add(value.partition("://")[2].rpartition("@")[0].partition(":")[2])
    return {form for text in found for form in (text, unquote(text)) if len(form.strip("/")) >= _SHORTEST}
