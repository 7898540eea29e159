"use strict";
// What happens elsewhere: each server-sent event becomes an event of the body.
(() => {
  const KINDS = ["questions", "people", "model", "versions"];

  function connect() {
    const source = new EventSource("/events");
    for (const kind of KINDS) {
      source.addEventListener(kind, (event) => {
        document.body.dispatchEvent(new CustomEvent(kind, { detail: JSON.parse(event.data) }));
      });
    }
    source.addEventListener("open", () => document.body.dispatchEvent(new CustomEvent("connected")));
    source.addEventListener("error", () => {
      document.body.dispatchEvent(new CustomEvent("disconnected"));
      // A lost connection is taken up again by the browser; a refused one is not.
      if (source.readyState === EventSource.CLOSED) setTimeout(connect, 3000);
    });
    addEventListener("pagehide", () => source.close(), { once: true });
  }

  addEventListener("pageshow", connect);
})();
