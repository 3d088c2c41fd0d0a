package e2b

import (
	"html/template"
	"net/http"
	"strings"
)

// refusal is the body of a data-plane request that was not carried.
type refusal struct {
	SandboxID string `json:"sandboxId"`
	Message   string `json:"message"`
	Port      int    `json:"port,omitempty"`
	Code      int    `json:"code"` // the HTTP status
}

// refuse answers with JSON, or to a person's browser with a page.
func refuse(w http.ResponseWriter, r *http.Request, f refusal, title string) {
	w.Header().Set("Cache-Control", "no-store")
	// The body of the request is not read: the connection cannot be used again.
	if r.ContentLength != 0 && r.ProtoMajor == 1 {
		w.Header().Set("Connection", "close")
	}
	if !isBrowser(r.UserAgent()) {
		writeJSON(w, f.Code, f)
		return
	}
	var b strings.Builder
	if err := page502.Execute(&b, struct {
		refusal
		Title string
	}{f, title}); err != nil {
		writeJSON(w, f.Code, f)
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.WriteHeader(f.Code)
	_, _ = w.Write([]byte(b.String()))
}

// isBrowser tells a person from a program by the one word that all browsers
// begin with.
func isBrowser(userAgent string) bool { return strings.HasPrefix(userAgent, "Mozilla/") }

var page502 = template.Must(template.New("refusal").Parse(`<html lang="en"><head><meta charset="utf-8"><title>{{.Title}}</title>
<style>body{font:16px/1.5 system-ui,sans-serif;max-width:36rem;margin:15vh auto;padding:0 1rem;color:#222}
code{background:#eee;padding:.1em .3em;border-radius:3px}@media(prefers-color-scheme:dark){body{background:#111;color:#ddd}code{background:#333}}</style>
</head><body><h1>{{.Title}}</h1><p>{{.Message}}.</p>
<p>Sandbox <code>{{.SandboxID}}</code>{{if .Port}}, port <code>{{.Port}}</code>{{end}}.</p></body></html>`))
