"use strict";
// What happens elsewhere: each server-sent event becomes an event of the body, the newest of a kind at most every so
// often, and never none.
(() => {
  const EVERY = { questions: 0, people: 3000, model: 3000, versions: 3000 }; // milliseconds
  const waiting = {};

  function tell(kind, detail) {
    document.body.dispatchEvent(new CustomEvent(kind, { detail }));
  }

  function tellLater(kind, detail) {
    if (!EVERY[kind]) return tell(kind, detail);
    if (kind in waiting) {
      waiting[kind] = { detail };
      return undefined;
    }
    waiting[kind] = null;
    setTimeout(() => {
      const news = waiting[kind];
      delete waiting[kind];
      if (news) tellLater(kind, news.detail);
    }, EVERY[kind]);
    return tell(kind, detail);
  }

  let source = null;

  // Only while the page is seen: a browser opens six connections to one host, for all tabs together.
  function connect() {
    if (source || document.hidden) return;
    const opened = (source = new EventSource("/events"));
    for (const kind of Object.keys(EVERY)) {
      opened.addEventListener(kind, (event) => tellLater(kind, JSON.parse(event.data)));
    }
    opened.addEventListener("open", () => tell("connected"));
    opened.addEventListener("error", () => {
      // A lost connection is taken up again by the browser; a refused one is not.
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
