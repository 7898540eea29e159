"use strict";
// What a person has said and the server has not acknowledged. It outlives a reload, in the browser's own storage,
// under the store and the person's name: nobody else who uses this browser sends it as his, and it never answers a
// question of the same number in another store.
class Unsent {
  constructor(storeId, person) {
    // Neither holds a blank, so that no prefix is the beginning of another one.
    this.prefix = `deep-rlhf unsent ${storeId} ${encodeURIComponent(person)} `;
    this.memory = new Map(); // where the browser stores nothing
    this.count = 0;
  }

  // Keeps { path, fields } and returns whether it outlives a reload.
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

  // All of them, the oldest first.
  all() {
    const found = [...this.memory].map(([key, record]) => ({ key, ...record }));
    try {
      for (const key of Object.keys(localStorage)) {
        if (key.startsWith(this.prefix)) found.push({ key, ...JSON.parse(localStorage.getItem(key)) });
      }
    } catch {
      // nothing is stored here
    }
    return found.sort((a, b) => (a.key < b.key ? -1 : 1));
  }

  remove(key) {
    this.memory.delete(key);
    try {
      localStorage.removeItem(key);
    } catch {
      // nothing is stored here
    }
  }
}
