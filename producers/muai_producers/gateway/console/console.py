"""The console as the gateway holds it; without it, `/` is an index for programs."""

from __future__ import annotations

from concurrent.futures import Executor
from typing import TYPE_CHECKING

from fastapi import FastAPI

from muai_producers.gateway.callers import Doorkeeper
from muai_producers.gateway.console import document
from muai_producers.gateway.console.api import ConsoleApi
from muai_producers.gateway.console.letters import LetterDesk
from muai_producers.gateway.console.lookout import Lookout
from muai_producers.gateway.console.pages import ConsolePages, IndexRoute
from muai_producers.gateway.draining import Drain
from muai_producers.gateway.health import Observer
from muai_producers.gateway.sessions import Sessions

if TYPE_CHECKING:
    from muai_config import Settings
    from muai_producers.client import InferenceClient


class Console:
    """The page and the data behind it, where the configuration wants them."""

    def __init__(
        self,
        settings: Settings,
        version: str,
        client: InferenceClient,
        observer: Observer,
        doorkeeper: Doorkeeper,
        drain: Drain,
        executor: Executor,
    ) -> None:
        self.public = frozenset({"/"})
        """Paths that need no key, or find out by themselves who asks."""
        self.types: tuple[type, ...] = (document.Index,)
        self._lookout: Lookout | None = None
        self._pages: ConsolePages | None = None
        if settings.gateway.console.enabled:
            self._lookout = Lookout(settings, observer, lambda: drain.draining)
            desk = LetterDesk(client.store, client.submit_many, settings.queue.default_deadline_s)
            sessions = Sessions(client.store, settings.gateway.console.session_s)
            self._pages = ConsolePages(settings, version, self._lookout, desk, doorkeeper, sessions, executor)
            self.public |= self._pages.paths
            self.types = document.TYPES
        self._index = IndexRoute(settings, version, self._pages)

    def on_settings(self, settings: Settings) -> None:
        """Show what these settings say from now on, as far as they are reloadable."""
        if self._lookout is not None:
            self._lookout.on_settings(settings)

    def register(self, app: FastAPI) -> None:
        """Give the application the paths."""
        self._index.register(app)
        if self._pages is not None and self._lookout is not None:
            self._pages.register(app)
            ConsoleApi(self._lookout).register(app)

    def close(self) -> None:
        """Close the connections."""
        if self._lookout is not None:
            self._lookout.close()
