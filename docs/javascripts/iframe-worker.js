// The search runs in a web worker, which browsers refuse to pages that are opened from a file: there, in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      this.started = new Promise((resolve, reject) => {
        frame.onload = () => {
          const scope = frame.contentWindow
          scope.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
          const script = frame.contentDocument.createElement("script")
          script.onload = () => resolve(scope)
          script.onerror = () => reject(new Error(`cannot read ${url}`))
          script.src = url
          frame.contentDocument.body.append(script)
        }
      })
      document.body.append(frame)
    }
    postMessage(data) {
      this.started.then(scope => scope.dispatchEvent(new scope.MessageEvent("message", { data })))
    }
  }
}
