package gvisor

type pool struct{}

func newPool(r *Runtime, n int) *pool { return &pool{} }
func (p *pool) close()                {}
