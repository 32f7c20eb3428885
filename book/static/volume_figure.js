// Figures made by difr3ct_core.viewer.show_volume: buttons that put a 3D viewer in the place of the picture.
// The viewer runs in a frame of its own (viewer.html), gets the voxels by message and says when it has drawn
// something. Until then, and whenever it fails, the picture stays.
(function () {
  "use strict";
  const PATIENCE_MS = 120000; // without a sign of life; drawing by processor on a busy laptop takes long
  const NAMES = { itk: "3D viewer", niivue: "light viewer" };

  // The voxels: base64 of gzip of int16 HU and, if there are organs, one byte per voxel for them.
  async function unpack(text) {
    const packed = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).arrayBuffer();
  }

  function setUp(figure, root) {
    const stage = figure.querySelector(".volume-stage");
    const status = figure.querySelector(".volume-status");
    const buttons = [...figure.querySelectorAll("button")];
    const spec = JSON.parse(figure.querySelector(".volume-spec").textContent);
    let frame = null;
    let timer = 0;
    let reason = ""; // why the other engine is not the one that is shown

    function say(state, text) {
      figure.dataset.state = state;
      status.textContent = text;
      for (const button of buttons) {
        button.setAttribute("aria-pressed", String(frame !== null && button.dataset.engine === frame.dataset.engine));
      }
      buttons.find((button) => button.dataset.engine === "").hidden = frame === null;
    }

    function close() {
      clearTimeout(timer);
      if (frame) frame.remove();
      frame = null;
    }

    function wait() {
      clearTimeout(timer);
      timer = setTimeout(() => fail("no answer"), PATIENCE_MS);
    }

    function fail(why) {
      const engine = frame.dataset.engine;
      close();
      if (engine === "itk") open("niivue", `The 3D viewer did not start (${why}).`);
      else say("failed", `No 3D viewer works here (${why}); the picture stays.`);
    }

    function open(engine, note) {
      close();
      reason = note;
      frame = document.createElement("iframe");
      frame.dataset.engine = engine;
      frame.title = `${NAMES[engine]}: ${spec.title}`;
      frame.allow = "fullscreen";
      frame.src = new URL(`_static/viewer.html#${engine}`, root);
      stage.append(frame);
      wait();
      say("loading", `${note} Loading the ${NAMES[engine]}; nothing leaves your computer.`);
    }

    async function onMessage(event) {
      if (!frame || event.source !== frame.contentWindow || !event.data) return;
      const target = frame;
      if (figure.dataset.state === "loading") wait();
      if (event.data.kind === "hello") {
        try {
          const buffer = await unpack(figure.querySelector(".volume-data").textContent);
          // The frame of a page opened as a file has no origin that could be named here.
          if (target === frame) frame.contentWindow.postMessage({ kind: "volume", buffer, spec }, "*", [buffer]);
        } catch (error) {
          if (target === frame) fail(error.message);
        }
      } else if (event.data.kind === "ready") {
        clearTimeout(timer);
        say("ready", `${reason} ${event.data.hint}`.trim());
      } else if (event.data.kind === "failed") {
        fail(event.data.why);
      }
    }

    window.addEventListener("message", onMessage);
    for (const button of buttons) {
      button.addEventListener("click", () => {
        if (button.dataset.engine) return open(button.dataset.engine, "");
        close();
        say("", "");
        buttons[0].focus();
      });
    }
    figure.querySelector(".volume-bar").hidden = false;
    say("", "");
  }

  function start() {
    // Sphinx writes where the root of the book is, seen from the page. Elsewhere there is no viewer to load.
    const root = document.documentElement.dataset.content_root;
    if (root === undefined || !window.DecompressionStream) return;
    for (const figure of document.querySelectorAll("figure.volume-figure")) {
      setUp(figure, new URL(root, location.href));
    }
  }

  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
})();
