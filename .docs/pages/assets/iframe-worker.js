// Pages opened from a folder may start no worker, and the search runs in one: there it runs in a hidden frame instead.
if (location.protocol === "file:") {
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.appendChild(frame)
      this.inside = frame.contentWindow
      const load = (source) => new Promise((done, failed) => {
        const script = this.inside.document.createElement("script")
        Object.assign(script, {src: source, onload: done, onerror: failed})
        this.inside.document.body.appendChild(script)
      })
      this.inside.postMessage = (data) => this.tell(this, data)
      this.inside.importScripts = (...sources) => sources.reduce((before, one) => before.then(() => load(one)), Promise.resolve())
      this.ready = load(new URL(url, document.baseURI).href)
      this.addEventListener("message", (event) => this.onmessage && this.onmessage(event))
    }
    tell(target, data) {
      target.dispatchEvent(new (target === this ? MessageEvent : this.inside.MessageEvent)("message", {data}))
    }
    postMessage(data) {
      this.ready.then(() => this.tell(this.inside, data))
    }
    terminate() {
      this.inside.frameElement.remove()
    }
  }
}
