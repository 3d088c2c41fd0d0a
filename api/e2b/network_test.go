package e2b

import (
	"encoding/json"
	"testing"

	"github.com/atoll-run/atoll/sandbox"
)

func parseNetwork(t *testing.T, text string) *networkConfig {
	t.Helper()
	var c networkConfig
	if err := json.Unmarshal([]byte(text), &c); err != nil {
		t.Fatal(err)
	}
	return &c
}

func TestInternetIsAllowedUnlessDenied(t *testing.T) {
	no := false
	for text, want := range map[string]bool{
		`{}`:                                   true,
		`{"denyOut":["8.8.8.8","10.0.0.0/8"]}`: true,
		`{"denyOut":["0.0.0.0/0"],"allowOut":["1.1.1.1","*.github.com"]}`: false,
	} {
		p, err := parseNetwork(t, text).policy(nil)
		if err != nil || p.Internet != want {
			t.Errorf("%s: %+v, %v", text, p, err)
		}
	}
	var none *networkConfig
	if p, err := none.policy(nil); err != nil || !p.Internet {
		t.Errorf("no network: %+v, %v", p, err)
	}
	if p, err := none.policy(&no); err != nil || p.Internet {
		t.Errorf("allow_internet_access false: %+v, %v", p, err)
	}
}

func TestRulesThatCannotBeEnforcedAreRefused(t *testing.T) {
	for _, text := range []string{
		`{"denyOut":["example.com"]}`,
		`{"allowOut":["http://example.com"]}`,
		`{"allowOut":["example.com"]}`, // limits nothing by itself
		`{"egressProxy":{"address":"proxy:1080"}}`,
		`{"rules":{"api.example.com":[{}]}}`,
	} {
		if _, err := parseNetwork(t, text).policy(nil); !sandbox.Is(err, sandbox.Invalid) {
			t.Errorf("%s: %v", text, err)
		}
	}
	for _, text := range []string{`{"maskRequestHost":"a b"}`, `{"maskRequestHost":"x\r\nEvil: 1"}`, `{"httpsPorts":[49983]}`, `{"httpsPorts":[0]}`} {
		if _, err := parseNetwork(t, text).labels(nil); !sandbox.Is(err, sandbox.Invalid) {
			t.Errorf("%s: %v", text, err)
		}
	}
}

func TestMaskedHostNamesThePortAddressed(t *testing.T) {
	labels, err := parseNetwork(t, `{"maskRequestHost":"custom.example.com:${PORT}","httpsPorts":[8443]}`).labels(nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := maskedHost(labels, 8080); got != "custom.example.com:8080" {
		t.Errorf("got %q", got)
	}
	if got := maskedHost(nil, 8080); got != "" {
		t.Errorf("without a mask: %q", got)
	}
	if got := httpsPorts(labels); len(got) != 1 || got[0] != 8443 {
		t.Errorf("got %v", got)
	}
}

func FuzzNetwork(f *testing.F) {
	f.Add(`{"denyOut":["0.0.0.0/0"],"allowOut":["1.1.1.1","*.github.com"],"maskRequestHost":"a:${PORT}"}`)
	f.Fuzz(func(t *testing.T, text string) {
		var c networkConfig
		if json.Unmarshal([]byte(text), &c) != nil {
			return
		}
		_, _ = c.policy(nil)
		labels, err := c.labels(nil)
		if err != nil {
			return
		}
		for _, r := range maskedHost(labels, 80) {
			if r <= ' ' || r > '~' {
				t.Fatalf("host header %q", maskedHost(labels, 80))
			}
		}
	})
}
