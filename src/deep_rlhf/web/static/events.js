"use strict";
// Server-sent events: each becomes an event of the body. Events of one kind are throttled; the newest is never dropped.
(() => {
  const INTERVAL = { questions: 0, people: 3000, model: 3000, versions: 3000 }; // milliseconds
  const waiting = {};

  function dispatch(kind, detail) {
    document.body.dispatchEvent(new CustomEvent(kind, { detail }));
  }

  function throttle(kind, detail) {
    if (!INTERVAL[kind]) return dispatch(kind, detail);
    if (kind in waiting) {
      waiting[kind] = { detail };
      return undefined;
    }
    waiting[kind] = null;
    setTimeout(() => {
      const next = waiting[kind];
      delete waiting[kind];
      if (next) throttle(kind, next.detail);
    }, INTERVAL[kind]);
    return dispatch(kind, detail);
  }

  let source = null;

  // Only while the page is visible: a browser opens at most six connections to one host, for all tabs together.
  function connect() {
    if (source || document.hidden) return;
    const opened = (source = new EventSource("/events"));
    for (const kind of Object.keys(INTERVAL)) {
      opened.addEventListener(kind, (event) => throttle(kind, JSON.parse(event.data)));
    }
    opened.addEventListener("open", () => dispatch("connected"));
    opened.addEventListener("error", () => {
      // The browser reopens a lost connection, but not a refused one.
      if (opened.readyState !== EventSource.CLOSED || source !== opened) return;
      source = null;
      setTimeout(connect, 3000);
    });
  }

  function disconnect() {
    source?.close();
    source = null;
  }

  addEventListener("pageshow", connect);
  addEventListener("pagehide", disconnect);
  document.addEventListener("visibilitychange", () => (document.hidden ? disconnect() : connect()));
})();
