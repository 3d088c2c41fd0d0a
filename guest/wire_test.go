package guest_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"mime/multipart"
	"net"
	"net/http"
	"net/textproto"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/atoll-run/atoll/guest/guesttest"
	"github.com/atoll-run/atoll/guest/wire"
)

// These tests speak to the agent as E2B's clients do, byte for byte, without
// our own client in between.

// raw is an HTTP client of an agent that adds nothing by itself.
func raw(a *guesttest.Agent) *http.Client {
	return &http.Client{Transport: &http.Transport{
		DisableCompression: true,
		DialContext:        func(ctx context.Context, _, _ string) (net.Conn, error) { return a.Dial(ctx) },
	}}
}

// do makes a call with headers given as "Name: value".
func do(t *testing.T, c *http.Client, method, path string, body []byte, headers ...string) (*http.Response, []byte) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, "http://guest"+path, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		req.Header.Set(name, value)
	}
	res, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res, answer
}

// unary makes a Connect call with JSON and returns the status and the answer.
func unary(t *testing.T, a *guesttest.Agent, procedure, body string, headers ...string) (int, map[string]any) {
	t.Helper()
	headers = append(headers, "Content-Type: application/json", "Connect-Protocol-Version: 1", "Connect-Timeout-Ms: 60000")
	res, answer := do(t, raw(a), http.MethodPost, "/"+procedure, []byte(body), headers...)
	var m map[string]any
	if err := json.Unmarshal(answer, &m); err != nil {
		t.Fatalf("%s: %q: %v", procedure, answer, err)
	}
	return res.StatusCode, m
}

// frame is one message of a Connect stream; flags 2 ends it.
type frame struct {
	flags byte
	body  map[string]any
}

// stream makes a streaming Connect call with JSON and passes frames to each
// until it returns false or the stream ends.
func stream(t *testing.T, a *guesttest.Agent, procedure, body string, each func(frame) bool, headers ...string) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	envelope := binary.BigEndian.AppendUint32([]byte{0}, uint32(len(body)))
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://guest/"+procedure, bytes.NewReader(append(envelope, body...)))
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range append(headers, "Content-Type: application/connect+json", "Connect-Protocol-Version: 1") {
		name, value, _ := strings.Cut(h, ": ")
		req.Header.Set(name, value)
	}
	res, err := raw(a).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if got := res.Header.Get("Content-Type"); res.StatusCode != 200 || got != "application/connect+json" {
		t.Fatalf("status %d, content type %q", res.StatusCode, got)
	}
	for {
		var head [5]byte
		if _, err := io.ReadFull(res.Body, head[:]); err != nil {
			t.Fatal(err)
		}
		text := make([]byte, binary.BigEndian.Uint32(head[1:]))
		if _, err := io.ReadFull(res.Body, text); err != nil {
			t.Fatal(err)
		}
		f := frame{flags: head[0]}
		if err := json.Unmarshal(text, &f.body); err != nil {
			t.Fatalf("%q: %v", text, err)
		}
		if !each(f) || f.flags&2 != 0 {
			return
		}
	}
}

// conformance: SPEC2 FR1.4
func TestACommandAsTheSDKRunsIt(t *testing.T) {
	a := guesttest.Start(t)
	var got []string
	stream(t, a, "process.Process/Start",
		`{"process":{"cmd":"/bin/bash","args":["-l","-c","echo hi; echo no >&2; exit 3"],"envs":{"A":"1"}},"stdin":false,"unknownField":1}`,
		func(f frame) bool {
			text, _ := json.Marshal(f.body)
			got = append(got, fmt.Sprintf("%d %s", f.flags, text))
			return true
		}, "Keepalive-Ping-Interval: 50", "Connect-Timeout-Ms: 60000")
	all := strings.Join(got, "\n")
	if !strings.HasPrefix(got[0], `0 {"event":{"start":{"pid":`) {
		t.Errorf("first event: %s", got[0])
	}
	for _, want := range []string{
		`0 {"event":{"data":{"stdout":"aGkK"}}}`,
		`0 {"event":{"data":{"stderr":"bm8K"}}}`,
		`0 {"event":{"end":{"error":"exit status 3","exitCode":3,"exited":true,"status":"exit status 3"}}}`,
		`2 {}`,
	} {
		if !strings.Contains(all, want) {
			t.Errorf("missing %s in\n%s", want, all)
		}
	}
}

func TestErrorsHaveTheCodesThatTheSDKTests(t *testing.T) {
	a := guesttest.Start(t)
	dir := t.TempDir()
	for _, tc := range []struct{ procedure, body, code string }{
		{"filesystem.Filesystem/Stat", `{"path":"/no/such"}`, "not_found"},
		{"filesystem.Filesystem/ListDir", `{"path":"/no/such","depth":1}`, "not_found"},
		{"filesystem.Filesystem/ListDir", `{"path":"/etc/passwd","depth":1}`, "invalid_argument"},
		{"filesystem.Filesystem/MakeDir", `{"path":"` + dir + `"}`, "already_exists"},
		{"filesystem.Filesystem/Move", `{"source":"/no/such","destination":"` + dir + `/x"}`, "not_found"},
		{"filesystem.Filesystem/GetWatcherEvents", `{"watcherId":"w1"}`, "not_found"},
		{"filesystem.Filesystem/RemoveWatcher", `{"watcherId":"w1"}`, "not_found"},
		{"process.Process/SendSignal", `{"process":{"pid":4194305},"signal":"SIGNAL_SIGKILL"}`, "not_found"},
		{"process.Process/SendSignal", `{"process":{"tag":"none"},"signal":9}`, "not_found"},
		{"process.Process/SendSignal", `{"signal":9}`, "invalid_argument"},
		{"process.Process/SendInput", `{"process":{"pid":1},"input":{"stdin":"eA=="}}`, "not_found"},
		{"process.Process/CloseStdin", `{"process":{"pid":1}}`, "not_found"},
	} {
		if status, m := unary(t, a, tc.procedure, tc.body); m["code"] != tc.code || status < 400 {
			t.Errorf("%s %s: got %d %v, want %s", tc.procedure, tc.body, status, m, tc.code)
		}
	}
	var end frame
	stream(t, a, "process.Process/Start", `{"process":{"cmd":"true","cwd":"/no/such"}}`, func(f frame) bool { end = f; return true })
	if e, _ := end.body["error"].(map[string]any); end.flags != 2 || e["code"] != "invalid_argument" || !strings.Contains(fmt.Sprint(e["message"]), "cwd '/no/such' does not exist") {
		t.Errorf("got %+v", end)
	}
}

func TestEntriesAndListsAreEncodedForTheSDK(t *testing.T) {
	a := guesttest.Start(t)
	dir := t.TempDir()
	if err := os.WriteFile(dir+"/f", []byte("12345"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(dir+"/f", time.Unix(1e9, 5e6), time.Unix(1e9, 5e6)); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir+"/f", 0o754); err != nil {
		t.Fatal(err)
	}
	_, m := unary(t, a, "filesystem.Filesystem/Stat", `{"path":"`+dir+`/f"}`)
	e, _ := m["entry"].(map[string]any)
	for key, want := range map[string]any{
		"name": "f", "type": "FILE_TYPE_FILE", "path": dir + "/f", "size": "5", "mode": float64(0o754),
		"permissions": "-rwxr-xr--", "modifiedTime": "2001-09-09T01:46:40.005Z",
	} {
		if e[key] != want {
			t.Errorf("%s: got %v, want %v", key, e[key], want)
		}
	}
	// The default of a timeout of 0 in some clients means none.
	if status, m := unary(t, a, "process.Process/List", `{}`, "Connect-Timeout-Ms: 0"); status != 200 || len(m) != 0 {
		t.Errorf("got %d %v", status, m)
	}
}

func TestAWatchThatIsPolled(t *testing.T) {
	a := guesttest.Start(t)
	dir := t.TempDir()
	_, m := unary(t, a, "filesystem.Filesystem/CreateWatcher", `{"path":"`+dir+`","recursive":true,"includeEntry":true}`)
	id := fmt.Sprint(m["watcherId"])
	if err := os.WriteFile(dir+"/f", []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	var events []any
	eventually(t, "the events arrive", func() bool {
		_, m := unary(t, a, "filesystem.Filesystem/GetWatcherEvents", `{"watcherId":"`+id+`"}`)
		more, _ := m["events"].([]any)
		events = append(events, more...)
		return len(events) >= 2
	})
	text, _ := json.Marshal(events[0])
	if got := string(text); !strings.Contains(got, `"type":"EVENT_TYPE_CREATE"`) || !strings.Contains(got, `"name":"f"`) || !strings.Contains(got, `"permissions":"-rw`) {
		t.Errorf("got %s", got)
	}
	if status, m := unary(t, a, "filesystem.Filesystem/RemoveWatcher", `{"watcherId":"`+id+`"}`); status != 200 {
		t.Errorf("got %d %v", status, m)
	}
}

func TestASilentStreamIsKeptAlive(t *testing.T) {
	a := guesttest.Start(t)
	for procedure, body := range map[string]string{
		"process.Process/Start":          `{"process":{"cmd":"sleep","args":["1000"]}}`,
		"filesystem.Filesystem/WatchDir": `{"path":"` + t.TempDir() + `"}`,
	} {
		seen := false
		stream(t, a, procedure, body, func(f frame) bool {
			text, _ := json.Marshal(f.body)
			seen = strings.Contains(string(text), `"keepalive":{}`)
			return !seen
		}, "Keepalive-Ping-Interval: 1")
		if !seen {
			t.Errorf("%s: no keepalive", procedure)
		}
	}
}

func TestInputThatIsStreamed(t *testing.T) {
	a := guesttest.Start(t)
	cmd := sh("cat")
	cmd.Stdin = true
	p := start(t, a.Client, cmd)
	var body []byte
	for _, msg := range []string{
		fmt.Sprintf(`{"start":{"process":{"pid":%d}}}`, p.PID), `{"data":{"input":{"stdin":"b25l"}}}`, `{"keepalive":{}}`, `{"data":{"input":{"stdin":"IHR3bwo="}}}`,
	} {
		body = append(binary.BigEndian.AppendUint32(append(body, 0), uint32(len(msg))), msg...)
	}
	if res, answer := do(t, raw(a), http.MethodPost, "/process.Process/StreamInput", body, "Content-Type: application/connect+json", "Connect-Protocol-Version: 1"); res.StatusCode != 200 || strings.Contains(string(answer), "error") {
		t.Fatalf("got %d %q", res.StatusCode, answer)
	}
	readUntil(t, p, "one two\n")
}

func gzipped(text string) []byte {
	var buf bytes.Buffer
	z := gzip.NewWriter(&buf)
	_, _ = io.WriteString(z, text)
	_ = z.Close()
	return buf.Bytes()
}

// conformance: SPEC2 FR2.4
func TestFilesAsTheSDKUploadsAndDownloadsThem(t *testing.T) {
	a := guesttest.Start(t)
	c, dir := raw(a), t.TempDir()
	at := "/files?path=" + url.QueryEscape(dir+"/f")

	res, answer := do(t, c, http.MethodPost, at, gzipped("zipped content"), "Content-Type: application/octet-stream", "Content-Encoding: gzip")
	if want := `[{"path":"` + dir + `/f","name":"f","type":"file"}]` + "\n"; res.StatusCode != 200 || string(answer) != want {
		t.Fatalf("got %d %s", res.StatusCode, answer)
	}
	if _, answer = do(t, c, http.MethodGet, at, nil, "Accept-Encoding: gzip, deflate"); string(answer) != "zipped content" {
		t.Errorf("got %q", answer)
	}
	if res, answer = do(t, c, http.MethodGet, at, nil, "Accept-Encoding: gzip"); res.Header.Get("Content-Encoding") != "gzip" {
		t.Errorf("not compressed: %q", answer)
	} else if z, err := gzip.NewReader(bytes.NewReader(answer)); err != nil {
		t.Error(err)
	} else if text, err := io.ReadAll(z); err != nil || string(text) != "zipped content" {
		t.Errorf("got %q %v", text, err)
	}
	res, answer = do(t, c, http.MethodGet, at, nil, "Range: bytes=7-13", "Accept-Encoding: gzip")
	if res.StatusCode != http.StatusPartialContent || string(answer) != "content" {
		t.Errorf("range: got %d %q", res.StatusCode, answer)
	}
	if res, answer = do(t, c, http.MethodPost, at, nil, "Content-Type: application/octet-stream"); res.StatusCode != 200 {
		t.Errorf("empty: got %d %s", res.StatusCode, answer)
	}
	if res, _ = do(t, c, http.MethodGet, at, nil); res.Header.Get("Content-Length") != "0" {
		t.Errorf("an empty file must say so: %v", res.Header)
	}
	for _, tc := range []struct {
		method, path string
		code         int
		header       string
	}{
		{http.MethodGet, "/files?path=/no/such", 404, "A: b"},
		{http.MethodGet, "/files?path=" + dir, 400, "A: b"},
		{http.MethodPost, "/files?path=" + dir, 400, "Content-Type: application/octet-stream"},
		{http.MethodPost, "/files", 400, "Content-Type: application/octet-stream"},
		{http.MethodPost, at, 400, "Content-Type: text/plain"},
		{http.MethodPost, at, 400, "Content-Encoding: br"},
	} {
		res, answer := do(t, c, tc.method, tc.path, []byte("x"), tc.header)
		var e wire.Error
		if err := json.Unmarshal(answer, &e); err != nil || res.StatusCode != tc.code || e.Code != tc.code || e.Message == "" {
			t.Errorf("%s %s: got %d %s", tc.method, tc.path, res.StatusCode, answer)
		}
	}
}

// form is a multipart body with files as the SDK names them: by their paths.
func form(files ...[2]string) (body []byte, contentType string) {
	var buf bytes.Buffer
	w := multipart.NewWriter(&buf)
	for _, f := range files {
		part, _ := w.CreatePart(textproto.MIMEHeader{
			"Content-Disposition": {fmt.Sprintf(`form-data; name="file"; filename="%s"`, f[0])}, "Content-Type": {"application/octet-stream"},
		})
		_, _ = io.WriteString(part, f[1])
	}
	_ = w.WriteField("other", "ignored")
	_ = w.Close()
	return buf.Bytes(), "Content-Type: " + w.FormDataContentType()
}

func TestSeveralFilesInOneForm(t *testing.T) {
	a := guesttest.Start(t)
	c, dir := raw(a), t.TempDir()
	body, media := form([2]string{dir + "/a/one", "1"}, [2]string{dir + "/two", "2"})
	res, answer := do(t, c, http.MethodPost, "/files", body, media, "X-Metadata-Author: ann", "X-Metadata-Two: 2 words")
	var infos []wire.FileInfo
	if err := json.Unmarshal(answer, &infos); err != nil || res.StatusCode != 200 || len(infos) != 2 {
		t.Fatalf("got %d %s", res.StatusCode, answer)
	}
	if infos[0].Path != dir+"/a/one" || infos[0].Name != "one" || infos[1].Metadata["author"] != "ann" || infos[1].Metadata["two"] != "2 words" {
		t.Errorf("got %+v", infos)
	}
	e, err := a.Stat(t.Context(), dir+"/two")
	if err != nil || e.Metadata["author"] != "ann" {
		t.Errorf("got %+v %v", e, err)
	}
	write(t, a.Client, dir+"/two", "again")
	if e, err := a.Stat(t.Context(), dir+"/two"); err != nil || len(e.Metadata) != 0 {
		t.Errorf("metadata outlives a new upload without: %+v %v", e, err)
	}
	body, media = form([2]string{"ignored", "by path"})
	if res, answer := do(t, c, http.MethodPost, "/files?path="+url.QueryEscape(dir+"/three"), body, media); res.StatusCode != 200 || read(t, a.Client, dir+"/three") != "by path" {
		t.Errorf("got %d %s", res.StatusCode, answer)
	}
	body, media = form([2]string{dir + "/x", "1"}, [2]string{dir + "/x", "2"})
	if res, _ := do(t, c, http.MethodPost, "/files", body, media); res.StatusCode != 400 {
		t.Errorf("the same file twice: got %d", res.StatusCode)
	}
	if res, _ := do(t, c, http.MethodPost, "/files", body[:40], media); res.StatusCode != 400 {
		t.Errorf("a form that is cut: got %d", res.StatusCode)
	}
}

// conformance: S1
func TestNothingButTheTokenOpensTheAgent(t *testing.T) {
	a := guesttest.Start(t)
	c, dir := raw(a), t.TempDir()
	initAs := func(token, body string) int {
		res, _ := do(t, c, http.MethodPost, "/init", []byte(body), "X-Access-Token: "+token)
		return res.StatusCode
	}
	if code := initAs("", `{"accessToken":"secret"}`); code != 204 {
		t.Fatalf("got %d", code)
	}
	for _, tc := range []struct {
		token, body string
		code        int
	}{
		{"", `{"accessToken":"other"}`, 401},
		{"wrong", `{"accessToken":"other"}`, 401},
		{"", `{"envVars":{"A":"b"}}`, 401},
		{"", `{}`, 401},
		{"", `{"accessToken":""}`, 401},
		{"", `{"accessToken":"secret"}`, 204}, // the same again proves as much
		{"secret", `{"envVars":{"A":"b"}}`, 204},
		{"secret", `{"accessToken":""}`, 204}, // and does not open the agent
		{"secret", `{broken`, 400},
		{"secret", `{"hostname":"-bad"}`, 400},
		{"secret", `{"entropy":"` + strings.Repeat("AAAA", 2000) + `"}`, 400},
		{"secret", `{"entropy":"AAAA","timestamp":"2026-01-01T00:00:00Z"}`, 204},
	} {
		if code := initAs(tc.token, tc.body); code != tc.code {
			t.Errorf("%q %s: got %d, want %d", tc.token, tc.body, code, tc.code)
		}
	}
	path := dir + "/f"
	for _, call := range []string{
		"GET /metrics", "GET /envs", "GET /logs", "POST /connect?port=1", "POST /shutdown", "GET /archive?path=/etc", "POST /archive?path=/tmp",
		"GET /files?path=" + path, "POST /files?path=" + path, "POST /process.Process/List", "POST /filesystem.Filesystem/Stat",
	} {
		method, target, _ := strings.Cut(call, " ")
		for _, token := range []string{"", "wrong"} {
			res, answer := do(t, c, method, target, []byte("{}"), "X-Access-Token: "+token, "Content-Type: application/json")
			if res.StatusCode != 401 {
				t.Errorf("%s with token %q: got %d %s", call, token, res.StatusCode, answer)
			}
		}
	}
	if res, _ := do(t, c, http.MethodGet, "/health", nil); res.StatusCode != 204 {
		t.Errorf("health: got %d", res.StatusCode)
	}
	if res, _ := do(t, c, http.MethodGet, "/envs", nil, "X-Access-Token: secret"); res.StatusCode != 200 {
		t.Errorf("with the token: got %d", res.StatusCode)
	}
	// The one who knows the old token replaces it.
	if code := initAs("secret", `{"accessToken":"next"}`); code != 204 {
		t.Fatalf("got %d", code)
	}
	if code := initAs("secret", `{"accessToken":"secret"}`); code != 401 {
		t.Errorf("the old token still works: got %d", code)
	}
}

func TestSignedURLs(t *testing.T) {
	a := guesttest.Start(t)
	c, path := raw(a), t.TempDir()+"/a b"
	token := "secret"
	if err := a.Init(t.Context(), wire.Init{AccessToken: &token}); err != nil {
		t.Fatal(err)
	}
	future, past := time.Now().Add(time.Hour).Unix(), time.Now().Add(-time.Hour).Unix()
	target := func(path, user, signature string, expires int64) string {
		q := url.Values{"path": {path}, "signature": {signature}}
		if user != "" {
			q.Set("username", user)
		}
		if expires != 0 {
			q.Set("signature_expiration", fmt.Sprint(expires))
		}
		return "/files?" + q.Encode()
	}
	for _, tc := range []struct {
		name, method, target string
		code                 int
	}{
		{"write", "POST", target(path, "", wire.Sign(token, path, wire.OpWrite, "", 0), 0), 200},
		{"read", "GET", target(path, "", wire.Sign(token, path, wire.OpRead, "", 0), 0), 200},
		{"read in time", "GET", target(path, "", wire.Sign(token, path, wire.OpRead, "", future), future), 200},
		{"read as a user", "GET", target(path, "root", wire.Sign(token, path, wire.OpRead, "root", future), future), 200},
		{"expired", "GET", target(path, "", wire.Sign(token, path, wire.OpRead, "", past), past), 401},
		{"expiry changed", "GET", target(path, "", wire.Sign(token, path, wire.OpRead, "", past), future), 401},
		{"expiry dropped", "GET", target(path, "", wire.Sign(token, path, wire.OpRead, "", past), 0), 401},
		{"another operation", "POST", target(path, "", wire.Sign(token, path, wire.OpRead, "", 0), 0), 401},
		{"another path", "GET", target(path+"x", "", wire.Sign(token, path, wire.OpRead, "", 0), 0), 401},
		{"another user", "GET", target(path, "root", wire.Sign(token, path, wire.OpRead, "", 0), 0), 401},
		{"another token", "GET", target(path, "", wire.Sign("guess", path, wire.OpRead, "", 0), 0), 401},
		{"none", "GET", target(path, "", "", 0), 401},
	} {
		if res, answer := do(t, c, tc.method, tc.target, []byte("x"), "Content-Type: application/octet-stream"); res.StatusCode != tc.code {
			t.Errorf("%s: got %d %s", tc.name, res.StatusCode, answer)
		}
	}
	if got := wire.Sign("token", "/p", "read", "user", 17); got != "v1_tPJAMQSOWs2yA8/FpviypPsRRz9lbY4iHHoeJLpJzvE" {
		t.Errorf("got %s", got)
	}
}

func TestTheAgentMeasuresItself(t *testing.T) {
	a := guesttest.Start(t)
	if _, err := a.Metrics(t.Context()); err != nil {
		t.Fatal(err)
	}
	run(t, a.Client, "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done")
	m, err := a.Metrics(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if m.CPUCount < 1 || m.CPUUsedPct <= 0 || m.CPUUsedPct > 100 || m.MemTotal == 0 || m.MemUsed == 0 || m.MemUsed > m.MemTotal ||
		m.DiskTotal == 0 || m.DiskUsed > m.DiskTotal || time.Since(time.Unix(m.Timestamp, 0)).Abs() > time.Hour {
		t.Errorf("got %+v", m)
	}
}
