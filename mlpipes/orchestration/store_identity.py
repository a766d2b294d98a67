"""Dagster and the store cannot be apart: an instance remembers the store that its history is about."""

import json
from typing import TYPE_CHECKING

from mlpipes.errors import ConfigError
from mlpipes.store.identity import identify, identity_of, is_empty
from mlpipes.store.layout import Store, default_store
from mlpipes.store.references import CHAIN

if TYPE_CHECKING:
    from dagster import DagsterInstance

KEY = "mlpipes/store"
"""In the instance's key-value storage, which every kind of storage has."""
_REMEDY = (
    "If the right store lies elsewhere, set MLPIPES_HOME to its home folder; if Dagster's history lies elsewhere, set "
    "DAGSTER_HOME. If the old store is gone for good, say `mlpipes store --adopt`; then `mlpipes backfill --again` makes "
    "everything again."
)


def check_store(instance: "DagsterInstance", store: Store) -> None:
    """Raises ConfigError if Dagster's history is about another store; an instance that remembers none adopts this one.

    Not so where it has a history of materializations and the store is empty: then they do not belong together either.
    """
    remembered = remembered_store(instance)
    if (
        remembered is None
        and is_empty(store)
        and (asset := _some_materialized(instance))
        # Another run may have come between: it adopts the store first, and materializes then.
        and (remembered := remembered_store(instance)) is None
    ):
        raise ConfigError(
            f"Dagster's history says that {asset} is materialized, but the store {store.root} is empty. {_REMEDY}"
        )
    if remembered is None:
        adopt(instance, store)
        return
    identity, root = remembered
    if (here := identity_of(store)) != identity:
        found = "has no id" if here is None else f"is store {here}"
        empty = " and is empty" if is_empty(store) else ""
        raise ConfigError(
            f"Dagster's history is about store {identity} (then at {root}), but {store.root} {found}{empty}. {_REMEDY}"
        )


def adopt(instance: "DagsterInstance", store: Store) -> str:
    """Have the instance remember this store from now on; returns the store's id."""
    identity = identify(store)
    instance.daemon_cursor_storage.set_cursor_values({KEY: json.dumps({"id": identity, "root": str(store.root)})})
    return identity


def remembered_store(instance: "DagsterInstance") -> tuple[str, str] | None:
    """Id and folder of the store that the instance remembers."""
    content = instance.daemon_cursor_storage.get_cursor_values({KEY}).get(KEY)
    if content is None:
        return None
    remembered = json.loads(content)
    return remembered["id"], remembered["root"]


def store_of_this_dagster(*, adopting: bool) -> str:
    """Which store Dagster's history goes with, for people; with `adopting`, with this one from now on.

    Raises ConfigError if it goes with another one.
    """
    import dagster as dg

    from mlpipes.orchestration.instance import dagster_home

    store = default_store()
    with dg.DagsterInstance.from_config(str(dagster_home())) as instance:
        if adopting:
            return f"Dagster's history goes with store {adopt(instance, store)} at {store.root} from now on."
        if remembered_store(instance) is None:
            return f"The store is {store.root}; Dagster's history goes with none yet, and adopts it at its first run."
        check_store(instance, store)
        return f"Store {identity_of(store)} at {store.root}; Dagster's history is about the same."


def _some_materialized(instance: "DagsterInstance") -> str | None:
    for key in instance.get_asset_keys():
        # Of a chain; what else a shared Dagster knows is not ours.
        if len(key.path) == 2 and key.path[1] in CHAIN and instance.get_latest_materialization_event(key) is not None:
            return key.to_user_string()
    return None
