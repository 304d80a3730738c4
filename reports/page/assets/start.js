"use strict";
// Everything above is defined; draw it. The page says when it is done, for tests and for whoever measures it.
(async () => {
  for (const part of WB.parts) {
    try {
      await part();
    } catch (problem) {
      console.error(problem);
    }
  }
  document.documentElement.dataset.ready = Math.round(performance.now());
})();
