package e2b

import (
	"net/http"
	"strings"
	"testing"

	"github.com/atoll-run/atoll/sandbox"
)

func TestHostNamesAddressPorts(t *testing.T) {
	for host, want := range map[string]address{
		"49983-abc123.e2b.app":           {"abc123", 49983},
		"8000-abc123.localhost:7700":     {"abc123", 8000},
		"8000-ABC123.example.com":        {"abc123", 8000},
		"3000-abc123-client.example.com": {"abc123", 3000},
		"1-a.b":                          {"a", 1},
	} {
		if got, ok := parseHost(host); !ok || got != want {
			t.Errorf("%s: got %v, %v", host, got, ok)
		}
	}
	for _, host := range []string{"", "localhost:7700", "127.0.0.1:7700", "api.example.com", "abc-def.example.com",
		"0-abc.example.com", "65536-abc.example.com", "+1-abc.example.com", "80-.example.com", "80-abc", "80-abc.",
		"80-a_b.example.com", "[::1]:7700", "080000-abc.example.com"} {
		if got, ok := parseHost(host); ok {
			t.Errorf("%q: got %v, want none", host, got)
		}
	}
}

func TestHostBeatsHeaders(t *testing.T) {
	r := &http.Request{Host: "8000-abc.example.com", Header: http.Header{headerSandbox: {"other"}, headerPort: {"49983"}}}
	if got, ok := addressOf(r); !ok || got != (address{"abc", 8000}) {
		t.Errorf("got %v, %v", got, ok)
	}
	r.Host = "127.0.0.1:7700"
	if got, ok := addressOf(r); !ok || got != (address{"other", 49983}) {
		t.Errorf("got %v, %v", got, ok)
	}
	r.Header.Del(headerPort)
	if got, ok := addressOf(r); !ok || got.port != sandbox.GuestPort {
		t.Errorf("without a port header: got %v, %v", got, ok)
	}
	r.Header.Set(headerPort, "x")
	if got, ok := addressOf(r); ok {
		t.Errorf("with a bad port: got %v", got)
	}
}

func FuzzHost(f *testing.F) {
	f.Add("49983-abc123.e2b.app", "", "")
	f.Add("localhost:7700", "abc-client", "8000")
	f.Fuzz(func(t *testing.T, host, id, port string) {
		r := &http.Request{Host: host, Header: http.Header{headerSandbox: {id}, headerPort: {port}}}
		a, ok := addressOf(r)
		if ok && (!sandbox.ValidID(a.id) || a.port < 1 || a.port > 65535) {
			t.Fatalf("%q %q %q gave %v", host, id, port, a)
		}
	})
}

func TestReferencesAreTeamNameAndTag(t *testing.T) {
	for in, want := range map[string]reference{
		"base":               {name: "base"},
		"Base":               {name: "base"},
		"my-app:v1.0":        {name: "my-app", tag: "v1.0"},
		"team/my_app:stable": {team: "team", name: "my_app", tag: "stable"},
	} {
		if got, err := parseReference(in); err != nil || got != want {
			t.Errorf("%q: got %+v, %v", in, got, err)
		}
	}
	for _, in := range []string{"", ":", "a:", ":b", "/a", "a/b/c", "/etc/passwd", "../x", "a:b:c", "host name", "a.b", strings.Repeat("a", 129)} {
		if got, err := parseReference(in); err == nil {
			t.Errorf("%q: got %+v, want an error", in, got)
		}
	}
}

func FuzzReference(f *testing.F) {
	f.Add("team/name:tag")
	f.Fuzz(func(t *testing.T, s string) {
		r, err := parseReference(s)
		if err != nil {
			return
		}
		again, err := parseReference(strings.TrimPrefix(r.team+"/"+r.name, "/"))
		if err != nil || again.name != r.name || strings.ContainsAny(r.name+r.tag, "/\x00") || strings.HasPrefix(r.name, ".") {
			t.Fatalf("%q gave %+v", s, r)
		}
	})
}
