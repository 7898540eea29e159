"use strict";
// What the scripts of the first tab share: parts of the page, and sentences to the person.
const one = (selector, inside = document) => inside.querySelector(selector);

// For those who hear the page.
function say(sentence) {
  one("[data-said]").textContent = sentence;
}

function warn(sentence, link) {
  const message = one("[data-message]");
  message.textContent = sentence;
  if (link) message.append(" ", Object.assign(document.createElement("a"), { href: link[0], textContent: link[1] }));
  message.hidden = !sentence;
}

const notSaved = (count) => `${count === 1 ? "1 answer is" : `${count} answers are`} not saved yet`;

// crypto.randomUUID is missing where a page is not encrypted.
function randomToken() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
