package openai

import (
	"encoding/binary"
	"encoding/json"

	"github.com/zeebo/blake3"

	"github.com/atoll-run/atoll/llm/host"
)

// answerKey names the answer to a request that always is answered alike: by the
// model's digest, the exact prompt and everything else that was asked for. It is
// empty for other requests, and when no answers are kept.
func (a *api) answerKey(m *host.Model, s *settings, kind string, prompt []int32, body []byte) string {
	if a.Answers == nil || !s.repeatable() || m.Info.Digest == "" {
		return ""
	}
	// What does not change the answer is left out of the request, and the
	// conversation, which the prompt stands for.
	var rest map[string]json.RawMessage
	if json.Unmarshal(body, &rest) != nil {
		return ""
	}
	for _, key := range []string{"model", "messages", "prompt", "stream", "stream_options", "user", "metadata", "store"} {
		delete(rest, key)
	}
	canonical, err := json.Marshal(rest) // with its keys in order
	if err != nil {
		return ""
	}
	sum := blake3.New()
	for _, part := range [][]byte{[]byte(m.Info.Digest), []byte(m.Engine.Numbers()), []byte(kind), canonical} {
		_, _ = sum.Write(binary.LittleEndian.AppendUint64(nil, uint64(len(part)))) // never fails
		_, _ = sum.Write(part)
	}
	for _, t := range prompt {
		_, _ = sum.Write(binary.LittleEndian.AppendUint32(nil, uint32(t)))
	}
	return string(sum.Sum(nil))
}

// kept is a whole chat completion.
type kept struct {
	Choices []chatChoice
	Usage   usage
}

// recall fills in an answer that was given before.
func (a *api) recall(key string, o *chatAnswer) bool {
	if key == "" {
		return false
	}
	data, ok := a.Answers.Get(key)
	var k kept
	if !ok || json.Unmarshal(data, &k) != nil || len(k.Choices) != len(o.choices) {
		return false
	}
	o.choices, o.Usage = k.Choices, k.Usage
	if o.Usage.Details != nil { // the whole prompt was known, one may say
		o.Usage.Details.Cached = o.Usage.Prompt
	}
	return true
}

// remember keeps an answer.
func (a *api) remember(key string, o *chatAnswer) {
	if key == "" {
		return
	}
	if data, err := json.Marshal(kept{o.choices, o.Usage}); err == nil {
		a.Answers.Put(key, data)
	}
}
