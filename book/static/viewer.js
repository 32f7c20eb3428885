// The page in the frame of a volume figure: loads one engine, draws the volume that the figure sends, and reports.
// It says "ready" only after looking at what was drawn: an engine can report success and show nothing.
(function () {
  "use strict";
  const SCRIPTS = { itk: "vendor/itkVtkViewer.js", niivue: "vendor/niivue.umd.js" };
  const ENGINES = { itk: showItk, niivue: showNiivue };
  const LABEL_COLOURS = "glasbey_light"; // the table whose first colours viewer.py knows as PALETTE
  // Of the window: air and lung clear, soft tissue a veil, bone dense.
  const OPACITY = [[0.5, 0], [0.66, 0.06], [0.72, 0.12], [0.85, 0.6], [0.99, 0.9]];
  const engine = location.hash.slice(1);
  const box = document.getElementById("view");
  const tell = (message) => parent.postMessage(message, "*");
  const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

  function load(address) {
    return new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = address;
      script.onload = resolve;
      script.onerror = () => reject(new Error(`${address} is missing`));
      document.head.append(script);
    });
  }

  // WebGL 2, and whether a processor stands in for the graphics card: then the first view must be a cheap one.
  function graphics() {
    const gl = document.createElement("canvas").getContext("webgl2");
    if (!gl) throw new Error("this browser has no WebGL 2");
    const info = gl.getExtension("WEBGL_debug_renderer_info");
    const name = String(gl.getParameter(info ? info.UNMASKED_RENDERER_WEBGL : gl.RENDERER));
    const lost = gl.getExtension("WEBGL_lose_context");
    if (lost) lost.loseContext();
    return { software: /swiftshader|llvmpipe|software|basic render/i.test(name) };
  }

  // How many colours a picture has, looked at on a coarse grid.
  async function coloursIn(source) {
    const image = new Image();
    image.src = source;
    await image.decode();
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = 64;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0, 64, 64);
    return new Set(new Uint32Array(context.getImageData(0, 0, 64, 64).data.buffer)).size;
  }

  async function waitForPicture(capture) {
    const began = performance.now();
    for (let attempt = 0; attempt < 8 || performance.now() < began + 15000; attempt += 1) {
      if ((await coloursIn(await capture())) > 8) return;
      await pause(250);
    }
    throw new Error("nothing was drawn");
  }

  async function showItk(voxels, organs, spec, software) {
    const mm = [...spec.spacing].reverse(); // x, y, z as ITK has them
    const size = [...spec.shape].reverse();
    const image = (name, data, componentType) => ({
      imageType: { dimension: 3, componentType, pixelType: "Scalar", components: 1 },
      name,
      origin: size.map((n, k) => -0.5 * (n - 1) * mm[k]),
      spacing: mm,
      direction: new Float64Array([1, 0, 0, 0, 1, 0, 0, 0, 1]),
      size,
      data,
      metadata: new Map(),
    });
    // The viewer begins with a rendering of the volume, whatever comes next; without a graphics card it is made small.
    if (software) box.style.inset = "0 auto auto 0";
    if (software) box.style.width = box.style.height = "96px";
    const small = Math.min(window.innerWidth, window.innerHeight * 1.5) < 640;
    const viewer = await itkVtkViewer.createViewer(box, {
      image: image("CT", voxels, "int16"),
      labelImage: organs ? image("organs", organs, "uint8") : undefined,
      rotate: false,
      use2D: false,
      config: {
        viewerConfigVersion: "0.3",
        uiCollapsed: small,
        main: { backgroundColor: [0, 0, 0], units: "mm" },
        renderingViewContainerStyle: {
          position: "relative", width: "100%", height: "100%", minHeight: "0", minWidth: "0", margin: "0", padding: "0",
          top: "0", left: "0", flex: "1 1 0px", overflow: "hidden",
        },
      },
    });
    viewer.setUICollapsed(small);
    window.viewer = viewer;
    const [low, high] = voxels.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
    const [black, white] = spec.window;
    const share = (f) => Math.min(1, Math.max(0, (black + f * (white - black) - low) / (high - low || 1)));
    // One opacity serves slices and rendering: a slice must be opaque, or soft tissue turns black in it.
    const veil = (mode) => {
      const clear = [[0, 0], ...OPACITY.map(([f, a]) => [share(f), a]), [1, 0.9]];
      viewer.setImagePiecewiseFunctionPoints(mode === "Volume" ? clear : [[0, 1], [1, 1]], 0, "CT");
    };
    viewer.on("viewModeChanged", veil);
    const dress = () => {
      viewer.setImageColorMap("Grayscale", 0, "CT");
      viewer.setImageColorRange(spec.window, 0, "CT");
      veil(viewer.getViewMode());
      if (!organs) return;
      viewer.setLabelImageLookupTable(LABEL_COLOURS, "CT");
      viewer.setLabelImageBlend(0.4, "CT");
      viewer.setLabelImageLabelNames(new Map(["none", ...spec.organs].map((name, k) => [k, name])), "CT");
    };
    // The viewer works out its own ranges and colours some time after it was made, and fails when told of them earlier.
    const began = performance.now();
    const told = [viewer.getImageColorMap, viewer.getImageColorRange, viewer.getImageColorRangeBounds];
    while (told.some((get) => get(0, "CT") === undefined)) {
      if (performance.now() > began + 90000) throw new Error("it did not take the volume");
      await pause(100);
    }
    dress();
    if (software) viewer.setViewMode("YPlane");
    box.removeAttribute("style");
    await waitForPicture(() => viewer.captureImage());
    dress(); // by now it has the organs too
    return software
      ? "No graphics card: it starts with slices. The cube in the menu renders the volume, slowly."
      : "Drag to turn, scroll to zoom; the menu has slices, window and organs.";
  }

  // A NIfTI-1 file in memory, on RAS axes as that format has it.
  function nifti(data, spec, code, bits) {
    const [nz, ny, nx] = spec.shape;
    const [dz, dy, dx] = spec.spacing;
    const header = new DataView(new ArrayBuffer(352));
    header.setInt32(0, 348, true);
    [3, nx, ny, nz, 1, 1, 1, 1].forEach((n, k) => header.setInt16(40 + 2 * k, n, true));
    header.setInt16(70, code, true);
    header.setInt16(72, bits, true);
    [1, dx, dy, dz].forEach((mm, k) => header.setFloat32(76 + 4 * k, mm, true));
    header.setFloat32(108, 352, true);
    header.setFloat32(112, 1, true);
    header.setUint8(123, 2); // mm
    header.setInt16(254, 1, true); // the affine below
    [
      [-dx, 0, 0, 0.5 * (nx - 1) * dx],
      [0, -dy, 0, 0.5 * (ny - 1) * dy],
      [0, 0, dz, -0.5 * (nz - 1) * dz],
    ].forEach((row, r) => row.forEach((value, k) => header.setFloat32(280 + 16 * r + 4 * k, value, true)));
    [0x6e, 0x2b, 0x31, 0].forEach((byte, k) => header.setUint8(344 + k, byte));
    const file = new Uint8Array(352 + data.byteLength);
    file.set(new Uint8Array(header.buffer));
    file.set(new Uint8Array(data.buffer, data.byteOffset, data.byteLength), 352);
    return file.buffer;
  }

  async function showNiivue(voxels, organs, spec, software) {
    const canvas = document.createElement("canvas");
    canvas.tabIndex = 0;
    box.append(canvas);
    const view = new niivue.Niivue({
      backColor: [0, 0, 0, 1],
      show3Dcrosshair: true,
      dragAndDropEnabled: false,
      logLevel: "error",
      multiplanarShowRender: software ? 0 : 1,
      isRadiologicalConvention: true,
      sagittalNoseLeft: true,
      crosshairWidth: 0.5,
      crosshairColor: [0.34, 0.71, 0.91, 0.8],
      showLegend: false,
    });
    await view.attachToCanvas(canvas, !software);
    await view.loadFromArrayBuffer(nifti(voxels, spec, 4, 16), "ct.nii");
    const ct = view.volumes[0];
    [ct.cal_min, ct.cal_max] = spec.window;
    if (organs) {
      await view.loadFromArrayBuffer(nifti(organs, spec, 2, 8), "organs.nii");
      view.volumes[1].setColormapLabel(spec.colours);
      view.setOpacity(1, 0.4);
    }
    view.updateGLVolume();
    window.viewer = view;
    await waitForPicture(() => {
      view.drawScene(); // in the same turn, for the browser clears the canvas after it
      return canvas.toDataURL();
    });
    return "Click to move the cross, scroll through slices, drag with the right button for window and level; V: views.";
  }

  async function show(message) {
    const [nz, ny, nx] = message.spec.shape;
    const voxels = new Int16Array(message.buffer, 0, nz * ny * nx);
    const organs = message.spec.colours ? new Uint8Array(message.buffer.slice(2 * nz * ny * nx)) : null;
    const { software } = graphics();
    await load(SCRIPTS[engine]);
    const hint = await ENGINES[engine](voxels, organs, message.spec, software);
    tell({ kind: "ready", hint });
  }

  window.addEventListener("message", (event) => {
    if (event.source !== parent || !event.data || event.data.kind !== "volume") return;
    const pulse = setInterval(() => tell({ kind: "alive" }), 5000);
    show(event.data)
      .catch((error) => tell({ kind: "failed", why: error.message || String(error) }))
      .finally(() => clearInterval(pulse));
  });
  if (engine in ENGINES) tell({ kind: "hello" });
})();
