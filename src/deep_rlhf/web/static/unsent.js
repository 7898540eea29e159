"use strict";
// Records that the server has not acknowledged. They survive a reload in the browser's storage, under the store's id
// and the user's name: another user of this browser never sends them, nor do they label a question of another store.
class Unsent {
  constructor(storeId, person) {
    // Neither contains a blank, so no prefix is the beginning of another one.
    this.prefix = `deep-rlhf unsent ${storeId} ${encodeURIComponent(person)} `;
    this.memory = new Map(); // used if the browser has no storage
    this.count = 0;
  }

  // Keeps { path, fields }; returns whether it survives a reload.
  add(record) {
    this.count += 1;
    const key = `${this.prefix}${Date.now()}-${String(this.count).padStart(6, "0")}-${randomToken().slice(0, 8)}`;
    try {
      localStorage.setItem(key, JSON.stringify(record));
      return true;
    } catch {
      this.memory.set(key, record);
      return false;
    }
  }

  // All records, oldest first.
  all() {
    const found = [...this.memory].map(([key, record]) => ({ key, ...record }));
    try {
      for (const key of Object.keys(localStorage)) {
        if (key.startsWith(this.prefix)) found.push({ key, ...JSON.parse(localStorage.getItem(key)) });
      }
    } catch {
      // there is no storage
    }
    return found.sort((a, b) => (a.key < b.key ? -1 : 1));
  }

  remove(key) {
    this.memory.delete(key);
    try {
      localStorage.removeItem(key);
    } catch {
      // there is no storage
    }
  }
}
