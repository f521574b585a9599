"""The page, served to this machine: to whoever has the token of its address."""

from __future__ import annotations

import os
import time
from functools import partial
from secrets import token_urlsafe
from urllib.parse import quote

from plait.errors import OutputError
from plait.extras import optional
from plait.mixer.gate import TOKEN, Gate
from plait.mixer.mixer import Mixer
from plait.mixer.page import CSS, Page, in_event_loop

HOST = "127.0.0.1"


class Server:
    """A page that is served until `close`, or to the end of a `with` block.

    Args:
        mixer: opened.
        port: where; the first free one from 7860 when None.
        share: also through a public address of gradio's.

    Attributes:
        url: the address, with the token that opens it.
        share_url: the public one; None where none was asked for.

    Raises:
        OutputError: the port is taken, or a public address cannot be had.
    """

    def __init__(self, mixer: Mixer, *, port: int | None = None, share: bool = False) -> None:
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read by some parts of gradio that take no argument
        gr, token = optional("gradio", "mix", "plait mix"), token_urlsafe(16)
        middleware = optional("starlette.middleware", "mix", "plait mix").Middleware
        self._blocks = Page(mixer).blocks
        fonts = ["ui-sans-serif", "system-ui", "sans-serif"]
        theme = gr.themes.Default(
            primary_hue="blue", neutral_hue="slate", font=fonts, font_mono=["ui-monospace", "Consolas", "monospace"]
        )
        try:
            _, local, public = in_event_loop(
                partial(
                    self._blocks.launch,
                    server_name=HOST,
                    server_port=port,
                    share=share,
                    prevent_thread_lock=True,
                    quiet=True,
                    show_error=True,
                    inline=False,
                    ssr_mode=False,
                    pwa=False,
                    enable_monitoring=False,
                    footer_links=[],
                    theme=theme,
                    css=CSS,
                    app_kwargs={"middleware": [middleware(Gate, token=token)]},
                )
            )
        except OSError as error:
            raise OutputError(f"the page cannot be served at port {port or 'any'}: {error}") from None
        if share and not public:
            self.close()
            raise OutputError(
                "a public address could not be had (gradio has printed why); without --share (share=) the page is served "
                "to this machine."
            )
        self.url = f"{local}?{TOKEN}={quote(token)}"
        self.share_url = f"{public}?{TOKEN}={quote(token)}" if public else None

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait(self) -> None:
        """Serve until the process is stopped."""
        while True:
            time.sleep(3600)

    def close(self) -> None:
        """Serve no more."""
        self._blocks.close(verbose=False)
